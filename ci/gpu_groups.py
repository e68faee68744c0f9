"""What `ci/gpu_verify.py` runs: jobs of each engine, grouped by the processes that run them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Prompts of 186 tokens run as 128 and 58, then 4 tokens a step: one run has all modes but `once`.
CHUNK = 128
# Prompts too run by a mode of few tokens: `once`.
FEW = 16
# Graphs of prompts: one for each mode, 58 tokens padded to the second.
PROMPT_GRAPHS = [FEW, 64, CHUNK]
ALL_MODES = {
    "steps": [{"up_to": 4, "mode": "small"}, {"up_to": FEW, "mode": "once"}, {"up_to": 80, "mode": "fused"}],
    "otherwise": "split",
}
ONCE_AND_FUSED = {"steps": [{"up_to": FEW, "mode": "once"}], "otherwise": "fused"}
SMALL_AND_SPLIT = {"steps": [{"up_to": 16, "mode": "small"}], "otherwise": "split"}
VLLM = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 30, "max_num_batched_tokens": CHUNK}
MORE_CACHE = {"kv_cache_memory_bytes": 2 << 30}
GDN = {"gdn_prefill_backend": "triton"}
GRAPHS = {"enforce_eager": False, "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, FEW]}}
ALL_GRAPHS = {**GRAPHS, "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, *PROMPT_GRAPHS]}}
SGLANG = {
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "max_total_tokens": 4096,
    "chunked_prefill_size": CHUNK,
    # Of what is free when it starts: others start at the same time.
    "mem_fraction_static": 0.8,
}
SGLANG_GRAPHS = {
    "disable_cuda_graph": False,
    "disable_prefill_cuda_graph": True,
    "cuda_graph_bs_decode": [1, 2, 4],
    "cuda_graph_max_bs_decode": 4,
}
# As SGLang has it by default: prompts run in graphs too.
SGLANG_ALL_GRAPHS = {
    **SGLANG_GRAPHS,
    "disable_prefill_cuda_graph": False,
    "cuda_graph_bs_prefill": PROMPT_GRAPHS,
}
CHUNKED, BATCHED = "chunked_prefill_size", "max_num_batched_tokens"
NATIVE = "triton, fused natively"
# Recipes that are folders of the command line: routed and shared experts in FP8, or the routed ones alone.
FP8, MIXED = "fp8", "mixed"
NO_FLASHINFER = {"VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER": "0"}
PAIRED_ENV = {
    **NO_FLASHINFER,
    "FSE_PATCH_LAYOUT": "paired",
    "FSE_PATCH_MEASURE": "off",
    "FSE_PATCH_ALLOW_UNMEASURED": "1",
}
FP8_ENV = {**NO_FLASHINFER, "FSE_PATCH_ALLOW_UNPROVEN": "1"}


@dataclass(frozen=True)
class Group:
    """Jobs that one process of each arm runs one after the other.

    Args:
        jobs: name -> (recipe, or `FP8` or `MIXED` for a folder that is given, engine arguments).
        backend: who runs the grouped GEMM, in the words of tuned tables.
        choice: the modes by number of tokens.
        dtype: the engine's; checkpoints are in bfloat16.
    """

    jobs: Mapping[str, tuple[str, Mapping[str, Any]]]
    backend: str = "triton"
    choice: Mapping[str, Any] = field(default_factory=lambda: ALL_MODES)
    quant: str = "none"
    dtype: str = "bfloat16"
    env: Mapping[str, str] = field(default_factory=dict)
    paired: bool = False

    @property
    def recipes(self) -> set[str]:
        """Return what its jobs run."""
        return {recipe for recipe, _ in self.jobs.values()}

    @property
    def gpus(self) -> int:
        """Return how many GPUs its jobs take; merged experts are cut for them."""
        return max(given.get(name, 1) for _, given in self.jobs.values() for name in GPUS)


def paired(jobs: Mapping[str, tuple[str, Mapping[str, Any]]], dtype: str = "bfloat16") -> Group:
    """Verify the paired layout up to 16 tokens: what layers so small gain is not asked.

    Prompts run in chunks of as many: the control acts on our pass alone.
    """
    few = {
        name: (recipe, {**given, **({CHUNKED: FEW} if CHUNKED in given else {BATCHED: FEW})})
        for name, (recipe, given) in jobs.items()
    }
    return Group(few, dtype=dtype, env=PAIRED_ENV, paired=True)


def fp8(choice: Mapping[str, Any]) -> Group:
    """Verify the FP8 checkpoint in vLLM."""
    arguments = {**VLLM, **GDN, **MORE_CACHE}
    jobs = {"qwen3_next": (FP8, arguments)}
    return Group(jobs, "triton+deepgemm", choice, "fp8-block 128x128", env=FP8_ENV)


def with_(jobs: Mapping[str, tuple[str, Mapping[str, Any]]], more: Mapping[str, Any]) -> dict[str, Any]:
    """Add engine arguments to each job."""
    return {name: (recipe, {**arguments, **more}) for name, (recipe, arguments) in jobs.items()}


# Families on two GPUs: routed experts of three dimensions and two slots of the shared expert among them.
VLLM_TWO = {
    "qwen3_next": ("qwen3_next", {**VLLM, **GDN, **GRAPHS}),
    "qwen3_5_3d": ("qwen3_5_vl_3d", {**VLLM, **GDN, **GRAPHS, "language_model_only": True}),
    "glm4_shared2": ("glm4_moe_shared2_scale", {**VLLM, **GRAPHS}),
    "qwen2_moe_wide4": ("qwen2_moe_wide4", {**VLLM, **GRAPHS}),
}
SGLANG_TWO = {
    "qwen3_next": ("qwen3_next", {**SGLANG, **SGLANG_GRAPHS}),
    "qwen3_5_3d": ("qwen3_5_text_3d", {**SGLANG, **SGLANG_GRAPHS}),
    "glm4_shared2": ("glm4_moe_shared2_scale", {**SGLANG, **SGLANG_GRAPHS}),
    "qwen2_moe_wide4": ("qwen2_moe_wide4", {**SGLANG, **SGLANG_GRAPHS}),
}
GPUS = ("tensor_parallel_size", "tp_size")
VLLM_TP = {"tensor_parallel_size": 2}
VLLM_EP = {**VLLM_TP, "enable_expert_parallel": True}
SGLANG_TP = {"tp_size": 2}
SGLANG_EP = {**SGLANG_TP, "ep_size": 2}

GROUPS: dict[str, dict[str, Group]] = {
    "vllm": {
        "small": Group(
            {
                "qwen3_next": ("qwen3_next", {**VLLM, **GDN}),
                # The text-only class is not in this release's registry.
                "qwen3_5": ("qwen3_5_vl", {**VLLM, **GDN, "language_model_only": True}),
                "glm4": ("glm4_moe_scale", VLLM),
                "qwen2_moe": ("qwen2_moe", VLLM),
            }
        ),
        "few": Group(
            {
                "qwen3_next": ("qwen3_next", {**VLLM, **GDN, "max_num_batched_tokens": FEW}),
                "glm4_graphs": ("glm4_moe_scale", {**VLLM, **GRAPHS, "max_num_batched_tokens": FEW}),
                "glm4_graphs_of_steps": ("glm4_moe_scale", {**VLLM, **GRAPHS}),
            }
        ),
        "graphs": Group(
            {
                "qwen3_next": ("qwen3_next", {**VLLM, **GDN, **ALL_GRAPHS}),
                "glm4": ("glm4_moe_scale", {**VLLM, **ALL_GRAPHS}),
            }
        ),
        "float16": Group(
            {
                "qwen3_next": ("qwen3_next", {**VLLM, **GDN}),
                # With another routed_scaling_factor than 1 stock itself is wrong (docs/hazards.md).
                "glm4": ("glm4_moe", VLLM),
                "qwen2_moe": ("qwen2_moe", VLLM),
            },
            dtype="float16",
        ),
        "fp8": fp8(SMALL_AND_SPLIT),
        "fp8_fused": fp8(ONCE_AND_FUSED),
        "paired": paired(
            {
                "qwen3_next": ("qwen3_next", {**VLLM, **GDN, **GRAPHS}),
                "qwen3_5": ("qwen3_5_vl", {**VLLM, **GDN, **GRAPHS, "language_model_only": True}),
                "glm4": ("glm4_moe_scale", {**VLLM, **GRAPHS}),
                "qwen2_moe_wide4": ("qwen2_moe_wide4", {**VLLM, **GRAPHS}),
            }
        ),
        "paired_float16": paired({"glm4": ("glm4_moe_scale", {**VLLM, **GRAPHS})}, "float16"),
        "paired_fp8": paired({"qwen3_next": (FP8, {**VLLM, **GDN, **GRAPHS, **MORE_CACHE})}),
        "paired_mixed": paired({"qwen3_next": (MIXED, {**VLLM, **GDN, **GRAPHS, **MORE_CACHE})}),
        "tp2": Group(with_(VLLM_TWO, VLLM_TP)),
        "paired_tp2": paired(with_(VLLM_TWO, VLLM_TP)),
        "paired_ep2": paired(with_(VLLM_TWO, VLLM_EP)),
    },
    "sglang": {
        "ours": Group(
            {
                "qwen3_5": ("qwen3_5_text", SGLANG),
                "qwen3_5_graphs": ("qwen3_5_text", {**SGLANG, **SGLANG_GRAPHS}),
                "qwen3_5_all_graphs": ("qwen3_5_text", {**SGLANG, **SGLANG_ALL_GRAPHS}),
                "qwen3_5_few": ("qwen3_5_text", {**SGLANG, "chunked_prefill_size": FEW}),
            }
        ),
        "native": Group(
            {
                "qwen3_next": ("qwen3_next", SGLANG),
                "qwen3_next_graphs": ("qwen3_next", {**SGLANG, **SGLANG_GRAPHS}),
                "qwen3_next_all_graphs": ("qwen3_next", {**SGLANG, **SGLANG_ALL_GRAPHS}),
                "qwen3_next_few": ("qwen3_next", {**SGLANG, "chunked_prefill_size": FEW}),
                "glm4": ("glm4_moe_scale", SGLANG),
            },
            NATIVE,
        ),
        # By default SGLang keeps this state in bfloat16, and its kernel does not compile for the two.
        "float16": Group(
            {"qwen3_5": ("qwen3_5_text", SGLANG)},
            dtype="float16",
            env={"SGLANG_MAMBA_CONV_DTYPE": "float16"},
        ),
        "float16_native": Group({"glm4": ("glm4_moe_scale", SGLANG)}, NATIVE, dtype="float16"),
        "paired": paired(
            {
                "qwen3_next": ("qwen3_next", {**SGLANG, **SGLANG_GRAPHS}),
                "qwen3_5": ("qwen3_5_text", {**SGLANG, **SGLANG_ALL_GRAPHS}),
                "glm4": ("glm4_moe_scale", {**SGLANG, **SGLANG_GRAPHS}),
                "qwen2_moe_wide4": ("qwen2_moe_wide4", {**SGLANG, **SGLANG_GRAPHS}),
            }
        ),
        "paired_fp8": paired({"qwen3_next": (FP8, {**SGLANG, **SGLANG_GRAPHS})}),
        "paired_mixed": paired({"qwen3_next": (MIXED, {**SGLANG, **SGLANG_GRAPHS})}),
        "paired_tp2": paired(with_(SGLANG_TWO, SGLANG_TP)),
        "paired_ep2": paired(with_(SGLANG_TWO, SGLANG_EP)),
    },
}
