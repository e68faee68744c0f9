"""The start of one role in SGLang: decided when SGLang instantiates its model."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

from ... import settings
from ...fusion_core.checkpoint.families import family_of
from ...fusion_core.checkpoint.naming import TensorNaming
from ...fusion_core.decision.native import gets_wrong
from ...fusion_core.decision.outcome import Merged
from ...fusion_core.forward.plan import ModePlan
from ..start import (
    Start,
    Unfused,
    announce,
    announce_other,
    checkpoint_folder,
    decision_of,
    refuse,
    role_of,
)
from . import native
from .native import ENGINE
from .plan import native_plan, plan_of
from .refusals import UPSTREAM, refusals

log = logging.getLogger("fse_patch")


def start_of(cls: type, model_config: Any, load_config: Any, quantised: object) -> Start | Unfused | None:
    """Decide for a model of ``cls``, record it and say it in a line; None where it is no entry class.

    Args:
        quantised: SGLang's quantisation of the model, None where it has none.
    """
    role = role_of(ENGINE, cls)
    if role is None:
        announce_other(ENGINE, cls)
        return None
    effective = settings.load()

    @functools.cache
    def locate() -> Path:
        return checkpoint_folder(model_config.model_path, model_config.revision, load_config.download_dir)

    decision = decision_of(ENGINE, role, locate, effective)
    family = family_of(model_config.hf_text_config.model_type)
    native_fusion = None if family is None else native.live(cls, family.name, model_config, quantised)
    native_off = native_fusion is not None and bool(gets_wrong(native_fusion, decision))
    remark = "; SGLang's own fusion is switched off" if native_off else ""
    if isinstance(decision, Merged):
        moe, right = decision.moe, native_fusion is not None and not native_off
        naming = TensorNaming(decision.family, model_config.hf_text_config.num_hidden_layers)
        reasons = refusals(decision, model_config, load_config, quantised, right, effective)
        plan = next(reasons, None) or plan_of(decision, model_config, effective)
        if isinstance(plan, ModePlan):
            announce(decision, remark)
            if native.platform() == "cuda":
                log.info("%s model: modes by number of tokens: %s (%s)", role, plan, plan.source)
            return Start(decision, moe, naming, locate(), plan, effective, native_off=native_off)
        stock = refuse(decision, plan, effective)
        # Modes for what SGLang fuses by itself, where nothing else forbids them.
        if plan.code == UPSTREAM and next(reasons, None) is None:
            beside = native_plan(stock, moe, model_config, effective)
            if beside is not None:
                remark = f"; modes by number of tokens, fused is SGLang's own: {beside} ({beside.source})"
                announce(stock, remark)
                return Start(stock, moe, naming, locate(), beside, effective)
        decision = stock
    announce(decision, remark)
    return Unfused(native_off)
