"""The decision for one role, made when vLLM starts to build its model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ...fusion_core.checkpoint.families import Role, family_of
from ...fusion_core.checkpoint.naming import TensorNaming
from ...fusion_core.decision.native import gets_wrong
from ...fusion_core.decision.outcome import FusionDecision
from .. import start
from ..start import checkpoint_folder, role_of, settle
from . import native
from .native import ENGINE
from .plan import plan_of
from .refusals import refusals
from .role import ModelFusion

log = logging.getLogger("fse_patch")


def decide_for(cls: type, vllm_config: Any) -> tuple[ModelFusion | None, bool]:
    """Decide for a model of ``cls``.

    Returns:
        How it is fused, or None where it is not an entry class itself or must stay stock; and whether vLLM's
        own fusion has to be switched off for it.
    """
    role = role_of(ENGINE, cls)
    if role is None or vllm_config is None:
        return None, False
    source, load_config = checkpoint_of(role, vllm_config)

    def own(decision: FusionDecision) -> dict[str, Any] | None:
        # A checkpoint that could not be read has no type of its own.
        family = family_of(decision.model_type or vllm_config.model_config.hf_text_config.model_type)
        return None if family is None else native.live(family.name)

    def must_go(decision: FusionDecision) -> bool:
        entry = own(decision)
        return entry is not None and bool(gets_wrong(entry, decision))

    def locate() -> Path:
        return checkpoint_folder(source.model, source.revision, load_config.download_dir)

    decision = settle(
        ENGINE,
        role,
        locate,
        lambda decision: refusals(decision, vllm_config, source, load_config, own(decision)),
        lambda decision: "; vLLM's own fusion is switched off" if must_go(decision) else "",
    )
    off = must_go(decision)
    if not decision.fuse:
        return None, off
    family = family_of(decision.model_type)
    assert family is not None
    layers = vllm_config.model_config.hf_text_config.num_hidden_layers
    fusion = ModelFusion(decision, TensorNaming(family, layers), locate())
    fusion.plan, _ = plan_of(decision, vllm_config)
    log.info("%s model: modes by number of tokens: %s", role, fusion.plan)
    return fusion, off


def checkpoint_of(role: Role, vllm_config: Any) -> tuple[Any, Any]:
    """Model and load configuration of a role: a draft may come from elsewhere, in another way."""
    speculative = vllm_config.speculative_config
    if role == "main" or speculative is None:
        return vllm_config.model_config, vllm_config.load_config
    return speculative.draft_model_config, speculative.draft_load_config or vllm_config.load_config


def announce_other(cls: type) -> None:
    """See `start.announce_other`."""
    start.announce_other(ENGINE, cls)
