"""The start of one role in vLLM: decided when vLLM begins to build its model."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

from ... import settings
from ...fusion_core.checkpoint.families import Role, family_of
from ...fusion_core.checkpoint.naming import TensorNaming
from ...fusion_core.decision.native import gets_wrong
from ...fusion_core.decision.outcome import Merged
from ...fusion_core.forward.plan import ModePlan
from ..start import Start, Unfused, announce, checkpoint_folder, decision_of, refuse, role_of
from . import native
from .formats import format_here
from .native import ENGINE
from .plan import plan_of
from .refusals import refusals

log = logging.getLogger("fse_patch")


def start_of(cls: type, vllm_config: Any) -> Start | Unfused | None:
    """Decide for a model of ``cls``, record it and say it in a line; None where it is no entry class."""
    role = role_of(ENGINE, cls)
    if role is None or vllm_config is None:
        return None
    effective = settings.load()
    source, load_config = checkpoint_of(role, vllm_config)

    @functools.cache
    def locate() -> Path:
        return checkpoint_folder(source.model, source.revision, load_config.download_dir)

    decision = decision_of(ENGINE, role, locate, effective)
    # A checkpoint that could not be read has no type of its own.
    family = family_of(decision.model_type or vllm_config.model_config.hf_text_config.model_type)
    native_fusion = None if family is None else native.live(family.name)
    native_off = native_fusion is not None and bool(gets_wrong(native_fusion, decision))
    remark = "; vLLM's own fusion is switched off" if native_off else ""
    if isinstance(decision, Merged):
        right = native_fusion is not None and not native_off
        reason = next(refusals(decision, vllm_config, source, load_config, right, effective), None)
        form = None if reason else format_here(decision, vllm_config)
        plan = reason or plan_of(decision, form, vllm_config, effective)
        if isinstance(plan, ModePlan):
            announce(decision, remark)
            log.info("%s model: modes by number of tokens: %s", role, plan)
            layers = vllm_config.model_config.hf_text_config.num_hidden_layers
            naming = TensorNaming(decision.family, layers)
            return Start(decision, decision.moe, naming, locate(), plan, effective, form, native_off)
        decision = refuse(decision, plan, effective)
    announce(decision, remark)
    return Unfused(native_off)


def checkpoint_of(role: Role, vllm_config: Any) -> tuple[Any, Any]:
    """Return model and load configuration of a role: a draft may come from elsewhere, in another way."""
    speculative = vllm_config.speculative_config
    if role == "main" or speculative is None:
        return vllm_config.model_config, vllm_config.load_config
    return speculative.draft_model_config, speculative.draft_load_config or vllm_config.load_config
