"""The start of one role in vLLM: decided when vLLM begins to build its model."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ... import settings
from ...fusion_core.checkpoint.families import Role, family_of
from ...fusion_core.checkpoint.sources import Source
from ...fusion_core.decision.native import gets_wrong
from ...fusion_core.decision.outcome import Merged
from ...fusion_core.forward.plan import ModePlan
from ...settings import Settings
from ..start import (
    PairedStart,
    Settled,
    Start,
    Unfused,
    begin,
    decision_of,
    first_of_replica,
    laid_out,
    role_of,
    source_of,
)
from . import native
from .either_layout import expert_ranks
from .formats import ExpertFormat, format_here
from .native import ENGINE
from .pair_refusals import pair_refusals
from .plan import plan_of
from .refusals import refusals

log = logging.getLogger("fse_patch")


def start_of(cls: type, vllm_config: Any) -> Start | PairedStart | Unfused | None:
    """Decide for a model of ``cls``, record it and say it in a line; None where it is no entry class."""
    role = role_of(ENGINE, cls)
    if role is None or vllm_config is None:
        return None
    effective = settings.load()
    source, load_config = checkpoint_of(role, vllm_config)
    model = _downloaded(source)
    form_of = functools.cache(lambda decision: format_here(decision, vllm_config))

    def settle() -> Settled:
        return settle_role(role, model, source, load_config, vllm_config, form_of, effective)

    groups = _groups(role)
    outcome = first_of_replica(settle, *groups) if groups else settle()
    decision, plan = outcome.decision, outcome.plan
    ranks = expert_ranks(vllm_config)
    # Experts spread whole run in one mode.
    form = form_of(decision) if isinstance(decision, Merged) and ranks == 1 else None
    text_config = vllm_config.model_config.hf_text_config
    start = begin(outcome, text_config.num_hidden_layers, effective, form, ranks)
    if plan is not None:
        log.info("%s model: modes by number of tokens: %s", role, plan)
    return start


def settle_role(
    role: Role,
    model: str,
    source: Any,
    load_config: Any,
    vllm_config: Any,
    form_of: Callable[[Merged], ExpertFormat | None],
    effective: Settings,
) -> Settled:
    """Settle all that is decided before allocation.

    Args:
        model: a folder, or the name of a repository.
        source, load_config: model and load configuration of the role.
        form_of: finds how vLLM holds the experts here.
    """

    def locate() -> Source:
        return source_of(
            model,
            source.revision,
            load_config.download_dir,
            stored_at=getattr(source, "model_weights", ""),
            token=source.hf_token,
        )

    outcome = decision_of(ENGINE, role, locate, load_config.load_format, effective)
    decision = outcome.decision
    # A checkpoint that could not be read has no type of its own.
    family = family_of(decision.model_type or vllm_config.model_config.hf_text_config.model_type)
    native_fusion = None if family is None else native.live(family.name)
    native_off = native_fusion is not None and bool(gets_wrong(native_fusion, decision))
    outcome = replace(
        outcome, native_off=native_off, remark="; vLLM's own fusion is switched off" if native_off else ""
    )
    right = native_fusion is not None and not native_off
    if isinstance(decision, Merged):
        reason = next(refusals(decision, vllm_config, source, load_config, right, effective), None)
        form = None if reason else form_of(decision)
        plan = reason or plan_of(decision, form, vllm_config, effective)
        if isinstance(plan, ModePlan):
            outcome = replace(outcome, plan=plan)
        else:
            outcome = replace(outcome, decision=decision.refused(plan))
    return laid_out(outcome, effective, lambda apart: pair_refusals(apart, vllm_config, right, effective))


def _downloaded(source: Any) -> str:
    """Return the model; one of ModelScope's hub as the folder that vLLM would download it to, now."""
    from vllm.model_executor.model_loader.weight_utils import maybe_download_from_modelscope

    return maybe_download_from_modelscope(source.model, source.revision) or str(source.model)


def _groups(role: Role) -> tuple[Any, Any] | None:
    """Return the processes that share a layer, and those that share out the layers; a draft is in one stage.

    None in a process that is alone.
    """
    from vllm.distributed import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return None
    stages = parallel_state.get_pp_group() if role == "main" else None
    return parallel_state.get_tp_group(), stages


def checkpoint_of(role: Role, vllm_config: Any) -> tuple[Any, Any]:
    """Return model and load configuration of a role: a draft may come from elsewhere, in another way."""
    speculative = vllm_config.speculative_config
    if role == "main" or speculative is None:
        return vllm_config.model_config, vllm_config.load_config
    return speculative.draft_model_config, speculative.draft_load_config or vllm_config.load_config
