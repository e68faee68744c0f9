"""What of SGLang's runtime configuration forbids to pair a checkpoint that could be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...fusion_core.decision.outcome import Paired
from ...fusion_core.decision.paired_places import unrun
from ...fusion_core.reasons import Reason
from ...settings import CPU_THRESHOLD, LAYOUT, Settings
from ..refusals import without_graphs
from ..running_config import config_differs, substituted
from . import native
from .either_layout import refusals_of_either, switched_off
from .refusals import RUNNERS

# Switches under which blocks run in pieces, or allocate in memory that other processes see.
IN_PIECES = ("enable_two_batch_overlap", "enable_single_batch_overlap", "enable_symm_mem")


def pair_refusals(
    decision: Paired, model_config: Any, quantised: object, effective: Settings
) -> Iterator[Reason]:
    """Say what of the runtime configuration forbids to pair, first reason first.

    Args:
        quantised: SGLang's quantisation of the model, None where it has none.
    """
    from sglang.srt.layers.moe import get_moe_runner_backend
    from sglang.srt.runtime_context import get_server_args
    from sglang.srt.utils import get_device_name

    server, platform = get_server_args(), native.platform()
    yield from switched_off()
    if platform == "cpu":
        if not effective.cpu_threshold:
            yield Reason("backend.layout", f"a CPU pairs for tests alone; set {CPU_THRESHOLD} for one")
    elif effective.layout != "paired":
        if (reason := unrun(decision.engine, platform, get_device_name(), decision.packed)) is not None:
            yield Reason(reason.code, f"{reason.detail}; {LAYOUT}=paired takes it anyway")
        if getattr(server, "disable_cuda_graph", False):
            yield without_graphs("--disable-cuda-graph")
    yield from refusals_of_either(decision.moe.layout, quantised)
    for name in IN_PIECES:
        if getattr(server, name, False):
            flag = name.replace("_", "-")
            yield Reason("backend.layout", f"blocks run in pieces; run without --{flag}")
    runner = get_moe_runner_backend().value
    if runner not in RUNNERS:
        yield Reason(
            "backend.layout", f"--moe-runner-backend is {runner}; use one of {', '.join(sorted(RUNNERS))}"
        )
    if server.enable_deterministic_inference:
        why = "with --enable-deterministic-inference, another way for another batch breaks its promise"
        yield Reason("slower.unmeasured", why)
    yield from config_differs(decision, model_config.hf_text_config)
    yield from substituted(model_config.hf_text_config, model_config.hf_config)
