"""What is verified on the real engine."""

from __future__ import annotations

from ..reports import Suite, laid_out
from ..running import Case
from ..slot_faults import PLANTED_TOO

TEXT_OF_VL = {"enable_multimodal": False}
FLOAT32 = [
    Case("qwen2_moe"),
    Case("qwen2_moe_renorm"),
    Case("qwen2_moe_wide4"),
    Case("glm4_moe_scale"),
    Case("glm4_moe_shared2_scale"),
    Case("glm4_moe_grouped"),
    Case("glm4v_moe", engine_args=TEXT_OF_VL),
]
# Linear attention runs in the stand-in operations of tests/shims/sglang_cpu, and the report has to say so.
REPLACED = [
    Case("qwen3_next"),
    Case("qwen3_5_text"),
    Case("qwen3_5_text_3d"),
    Case("qwen3_5_vl", engine_args=TEXT_OF_VL),
    Case("qwen3_5_vl_3d", engine_args=TEXT_OF_VL),
]
# Proved by the canary alone.
BFLOAT16 = [Case("glm4_moe_scale", "bfloat16")]
# Compared with stock without tensor parallelism: a shard in the wrong place shows too.
TENSOR_PARALLEL = [Case("qwen2_moe_wide4", engine_args={"tp_size": 2})]
# A model that nobody patches.
STOCK = [Case("qwen3_moe")]
PERMUTED = [Case("glm4_moe_shared2_scale", order=order) for order in ("shared_first", "shuffled")]
# Deliberate faults, and the words with which each must be refused.
FAULTS: dict[str, tuple[str, str]] = {
    "shared_weight_1_percent": ("qwen2_moe", "log-probabilities differ"),
    "gate_and_up_swapped": ("glm4_moe_scale", "log-probabilities differ"),
    "down_proj_dropped": ("qwen2_moe", "never written"),
    "slot_written_twice": ("qwen2_moe_wide4", "written more than once"),
    "scale_in_the_slot": ("glm4_moe_scale", "log-probabilities differ"),
    "patch_never_fired": ("qwen2_moe", "was not fused"),
    "control_without_effect": ("qwen2_moe", "the control"),
}
FAULTY = [Case(recipe, fault=fault) for fault, (recipe, _) in FAULTS.items()]
# On every release in `make test` too: a model of each block, and a fault.
EACH = {"qwen2_moe", "qwen3_next", "qwen3_5_vl_3d", "glm4_moe_scale"}
EACH_FAULT = {Case("qwen2_moe", fault="shared_weight_1_percent").name}
# In `make test-all` alone: recipes and cases beside which another one takes the same way.
LONG = {
    "qwen2_moe_renorm",
    "qwen3_5_text",
    "qwen3_5_text_3d",
    "qwen3_5_vl",
    Case("glm4_moe_shared2_scale", order="shared_first").name,
}
LONG |= {case.name for case in FAULTY if case.fault in PLANTED_TOO}
# Recipes that are multimodal, and run as text models.
REPORTS = Suite("sglang", {"qwen3_5_vl": TEXT_OF_VL})
# As the fuzzer lays files out.
LAID_OUT = laid_out("sglang", 6)
