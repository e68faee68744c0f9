"""What is verified on the real engine."""

from __future__ import annotations

from importlib.metadata import version

from ..running import Case

# All cases run on this release; its neighbours run one or two of each family, no test marked `one_release`.
WHOLE = version("sglang") == "0.5.20"
TEXT_OF_VL = {"enable_multimodal": False}
FLOAT32 = [Case("qwen2_moe"), Case("glm4_moe_scale")]
FLOAT32 += [Case("qwen2_moe_renorm"), Case("qwen2_moe_wide4")] if WHOLE else []
FLOAT32 += [Case("glm4_moe_shared2_scale"), Case("glm4_moe_grouped")] if WHOLE else []
# Linear attention runs in the stand-in operations of tests/shims/sglang_cpu, and the report has to say so.
REPLACED = [Case("qwen3_next"), Case("qwen3_5_text"), Case("qwen3_5_vl_3d", engine_args=TEXT_OF_VL)]
REPLACED += [Case("qwen3_5_text_3d"), Case("qwen3_5_vl", engine_args=TEXT_OF_VL)] if WHOLE else []
# Compared with stock without tensor parallelism: a shard in the wrong place shows too.
TENSOR_PARALLEL = [Case("qwen2_moe_wide4", engine_args={"tp_size": 2})]
# A model that nobody patches.
STOCK = [Case("qwen3_moe")]
PERMUTED = [Case("glm4_moe_shared2_scale", order=order) for order in ("shared_first", "shuffled") if WHOLE]
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
if not WHOLE:
    FAULTS = {name: FAULTS[name] for name in ("shared_weight_1_percent", "patch_never_fired")}
FAULTY = [Case(recipe, fault=fault) for fault, (recipe, _) in FAULTS.items()]
