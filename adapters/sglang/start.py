"""The start of one role in SGLang: decided when SGLang instantiates its model."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from ... import settings
from ...errors import FsePatchError
from ...fusion_core.checkpoint.families import Role, family_of
from ...fusion_core.checkpoint.sources import Source
from ...fusion_core.checkpoint.weight_files import weight_files
from ...fusion_core.decision.native import gets_wrong
from ...fusion_core.decision.outcome import Merged
from ...fusion_core.forward.plan import ModePlan
from ...settings import Settings
from ..start import (
    PairedStart,
    Settled,
    Start,
    Unfused,
    announce_other,
    begin,
    decision_of,
    first_of_replica,
    laid_out,
    role_of,
    source_of,
)
from . import native
from .either_layout import expert_ranks
from .native import ENGINE
from .pair_refusals import pair_refusals
from .plan import native_plan, plan_of
from .refusals import UPSTREAM, load_format_given, refusals

log = logging.getLogger("fse_patch")


def start_of(
    cls: type, model_config: Any, load_config: Any, quantised: object
) -> Start | PairedStart | Unfused | None:
    """Decide for a model of ``cls``, record it and say it in a line; None where it is no entry class.

    Args:
        quantised: SGLang's quantisation of the model, None where it has none.
    """
    effective = settings.load()
    role = role_of(ENGINE, cls)
    if role is None:
        announce_other(ENGINE, cls, effective)
        return None

    def settle() -> Settled:
        return settle_role(role, cls, model_config, load_config, quantised, effective)

    groups = _groups(role)
    outcome = first_of_replica(settle, *groups) if groups else settle()
    layers = model_config.hf_text_config.num_hidden_layers
    start = begin(outcome, layers, effective, ranks=expert_ranks())
    if isinstance(outcome.decision, Merged) and native.platform() == "cuda":
        plan = outcome.plan
        log.info("%s model: modes by number of tokens: %s (%s)", role, plan, plan.source if plan else "")
    return start


def settle_role(
    role: Role, cls: type, model_config: Any, load_config: Any, quantised: object, effective: Settings
) -> Settled:
    """Settle all that is decided before allocation; arguments as of `start_of`."""
    load_format = load_format_given(load_config)

    def suffices(cached: Source) -> bool:
        try:
            return bool(weight_files(cached, ENGINE, load_format).names)
        except FsePatchError:
            return False

    def locate() -> Source:
        return source_of(
            _downloaded(model_config, load_config),
            model_config.revision,
            load_config.download_dir,
            stored_at=getattr(model_config, "model_weights", ""),
            suffices=suffices,
        )

    outcome = decision_of(ENGINE, role, locate, load_format, effective)
    family = family_of(model_config.hf_text_config.model_type)
    native_fusion = None if family is None else native.live(cls, family.name, model_config, quantised)
    native_off = native_fusion is not None and bool(gets_wrong(native_fusion, outcome.decision))
    outcome = replace(
        outcome, native_off=native_off, remark="; SGLang's own fusion is switched off" if native_off else ""
    )
    right = native_fusion is not None and not native_off
    merged = _merged(outcome, model_config, load_config, quantised, right, effective)
    return laid_out(merged, effective, lambda apart: pair_refusals(apart, model_config, quantised, effective))


def _merged(
    outcome: Settled, model_config: Any, load_config: Any, quantised: object, right: bool, effective: Settings
) -> Settled:
    """Settle the role as it is where weights are merged, or stay stock; arguments as of `refusals`."""
    decision = outcome.decision
    if not isinstance(decision, Merged):
        return outcome
    reasons = refusals(decision, model_config, load_config, quantised, right, effective)
    plan = next(reasons, None) or plan_of(decision, model_config, effective)
    if isinstance(plan, ModePlan):
        return replace(outcome, plan=plan)
    stock = decision.refused(plan)
    # Modes for what SGLang fuses by itself, where nothing else forbids them.
    if plan.code == UPSTREAM and next(reasons, None) is None:
        beside = native_plan(stock, decision.moe, model_config, effective)
        if beside is not None:
            remark = f"; modes by number of tokens, fused is SGLang's own: {beside} ({beside.source})"
            return replace(outcome, decision=stock, plan=beside, remark=remark, native_off=False)
    return replace(outcome, decision=stock)


def _downloaded(model_config: Any, load_config: Any) -> str:
    """Return the model; one of ModelScope's hub as the folder that SGLang would download it to, now."""
    from sglang.srt.model_loader.loader import DefaultModelLoader

    loader = SimpleNamespace(load_config=load_config)
    model: str = DefaultModelLoader._maybe_download_from_modelscope(
        loader, model_config.model_path, model_config.revision
    )
    return model


def _groups(role: Role) -> tuple[Any, Any] | None:
    """Return the processes that share a layer, and those that share out the layers; a draft is in one stage.

    None in a process that is alone.
    """
    from sglang.srt.distributed import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return None
    stages = parallel_state.get_pp_group() if role == "main" else None
    return parallel_state.get_tp_group(), stages
