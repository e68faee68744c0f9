"""What of SGLang's runtime configuration forbids to fuse a checkpoint that could."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from ...fusion_core.checkpoint.config import UNQUANTISED
from ...fusion_core.checkpoint.weight_files import AUTO
from ...fusion_core.decision.outcome import Merged
from ...fusion_core.reasons import Reason
from ...settings import Settings
from ..refusals import quantised_online, without_proof
from ..running_config import config_differs, substituted
from . import native, spread
from .either_layout import expert_ranks, refusals_of_either, switched_off

UPSTREAM: Final = "upstream.already"
# Backends whose top-k comes in the standard format; others route by themselves or take no more columns.
RUNNERS = {"auto", "triton"}


def refusals(
    decision: Merged,
    model_config: Any,
    load_config: Any,
    quantised: object,
    native_right: bool,
    effective: Settings,
) -> Iterator[Reason]:
    """Say what of the runtime configuration forbids to fuse, first reason first.

    Args:
        quantised: SGLang's quantisation of the model, None where it has none.
        native_right: SGLang's own fusion is live, and right for this checkpoint.
    """
    from sglang.srt.layers.moe import get_moe_runner_backend

    yield from switched_off()
    if native_right:
        yield Reason(UPSTREAM, "SGLang fuses this model by itself here")
    yield from refusals_of_either(decision.moe.layout, quantised)
    if expert_ranks() > 1 and (runner := _runner(decision)) not in spread.LEAVE_OUT:
        why = f"the MoE runner here ({runner}) is not known to leave out experts of other processes"
        yield Reason("parallel.ep", f"{why}; run without --ep-size")
    runner = get_moe_runner_backend().value
    if runner not in RUNNERS:
        yield Reason(
            "backend.topk_format",
            f"--moe-runner-backend is {runner}; use one of {', '.join(sorted(RUNNERS))}",
        )
    yield from quantised_online(decision, model_config.quantization, quantised)
    yield from config_differs(decision, model_config.hf_text_config)
    yield from substituted(model_config.hf_text_config, model_config.hf_config)
    yield from without_proof(decision, native.platform(), effective)


def _runner(decision: Merged) -> str:
    """Return who runs the experts, as far as it is known before they are built."""
    from sglang.srt.layers.moe import get_moe_runner_backend

    if native.platform() != "cuda":
        return native.platform()
    runner = str(get_moe_runner_backend().value)
    return "triton" if runner == "auto" and decision.quant_method == UNQUANTISED else runner


def load_format_given(load_config: Any) -> str:
    """Return the load format as the user gave it.

    Some loaders set it back to ``auto`` before they build a model, which they then load in their own way.
    """
    from sglang.srt.runtime_context import get_model

    # While a draft is loaded, SGLang has its own format there.
    now, given = (_format_name(of.load_format) for of in (load_config, get_model()))
    return given if now == AUTO else now


def _format_name(load_format: Any) -> str:
    return str(getattr(load_format, "value", load_format)).lower()
