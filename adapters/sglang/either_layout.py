"""What of SGLang's runtime configuration forbids to run layers of ours, however their weights lie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...fusion_core.decision.layout import ExpertLayout
from ...fusion_core.reasons import Reason
from ..lora import folders_of, refused_adapters
from ..refusals import undivided, unshared

# Switches of its TopK, which not every mode asks.
SIMULATORS = ("SGLANG_SIMULATE_UNIFORM_EXPERTS", "SGLANG_SIMULATE_ROUND_ROBIN_EXPERTS")
# Options of newer releases: experts that are paged in, that join later, or whose tokens are balanced.
LAYOUTS = ("enable_paged_experts", "enable_waterfill", "ep_join_mode")
INTERLEAVED = "SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED"


def switched_off() -> Iterator[Reason]:
    """Refuse where the user asks that no shared expert is fused."""
    from sglang.srt.runtime_context import get_server_args

    if get_server_args().disable_shared_experts_fusion:
        yield Reason("disabled", "--disable-shared-experts-fusion is given")


def refusals_of_either(layout: ExpertLayout, quantised: object) -> Iterator[Reason]:
    """Say what forbids both layouts, first reason first.

    Args:
        quantised: SGLang's quantisation of the model, None where it has none.
    """
    from sglang.srt.runtime_context import get_server_args

    server = get_server_args()
    yield from _spread(layout, server, quantised)
    if server.enable_lora or server.lora_paths:
        adapters = folders_of(server.lora_paths)
        yield from refused_adapters(server.lora_target_modules, adapters, "--lora-target-modules")
    if server.cpu_offload_gb or server.offload_group_size > 0:
        flags = "--cpu-offload-gb and --offload-group-size"
        yield Reason("memory.offload", f"weights are kept in the host's memory; run without {flags}")
    if server.enable_memory_saver:
        why = "weights may be released while it serves; run without --enable-memory-saver"
        yield Reason("memory.sleep", why)
    yield from _routing(server)
    yield from _laid_otherwise(server)


def expert_ranks() -> int:
    """Return over how many processes whole experts are spread; 1: they are not."""
    from sglang.srt.runtime_context import get_server_args

    return int(get_server_args().ep_size)


def _spread(layout: ExpertLayout, server: Any, quantised: object) -> Iterator[Reason]:
    """Refuse what moves experts, or tokens, between processes."""
    from sglang.srt.layers.moe import get_moe_a2a_backend

    if server.enable_eplb or server.ep_num_redundant_experts:
        yield Reason("parallel.eplb", "the expert load balancer is on; run without --enable-eplb")
    if not get_moe_a2a_backend().is_none():
        why = "tokens are sent to the processes of their experts; run without --moe-a2a-backend"
        yield Reason("parallel.all2all", why)
    if server.dp_size > 1 or server.enable_dp_attention:
        yield Reason("parallel.dp", f"data parallelism is on (--dp-size {server.dp_size}); run without it")
    block = getattr(quantised, "weight_block_size", None)
    parts = server.tp_size // server.ep_size
    yield from undivided(layout, parts, block, "--tp-size", server.ep_size)
    yield from unshared(layout, server.ep_size, "--ep-size")


def _routing(server: Any) -> Iterator[Reason]:
    """Refuse what looks at, or replaces, the engine's own routing."""
    from sglang.srt.environ import envs

    if server.kt_weight_path is not None:
        why = "KTransformers runs experts by their number; run without --kt-weight-path"
        yield Reason("backend.routing", why)
    if server.enable_return_routed_experts or server.expert_distribution_recorder_mode:
        flags = "--enable-return-routed-experts and --expert-distribution-recorder-mode"
        yield Reason("routing.capture", f"routed experts are recorded; run without {flags}")
    if any(setting is not None and setting.get() for setting in (getattr(envs, n, None) for n in SIMULATORS)):
        yield Reason("routing.simulator", f"one of {', '.join(SIMULATORS)} is set; unset it")


def _laid_otherwise(server: Any) -> Iterator[Reason]:
    """Refuse experts that do not lie in their tensors as the checkpoint has them."""
    from sglang.srt.environ import envs

    if options := [name for name in LAYOUTS if getattr(server, name, None)]:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in options)
        yield Reason("backend.layout", f"experts lie, or are shared out, in another way; run without {flags}")
    interleaved = getattr(envs, INTERLEAVED, None)
    if interleaved is not None and interleaved.get():
        yield Reason("backend.layout", f"{INTERLEAVED} mixes the rows of gate and up; unset it")
