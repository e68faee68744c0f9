"""The decision for one role, made when vLLM starts to build its model: checkpoint first, then runtime."""

from __future__ import annotations

import dataclasses
import logging
from functools import cache
from pathlib import Path
from typing import Any

from ... import runtime, settings
from ...errors import FsePatchError
from ...fusion_core.decide import decide
from ...fusion_core.decision import FusionDecision
from ...fusion_core.families import Role, family_of
from ...fusion_core.naming import TensorNaming
from ...fusion_core.policy_file import load_policy
from .. import ledger
from .fusion import ModelFusion
from .refusals import refusals

log = logging.getLogger("fse_patch")
ENGINE = "vllm"


@cache
def entry_roles() -> dict[str, Role]:
    """Role of each entry class, by ``module:class``."""
    return dict(ledger.load(ENGINE).roles)


def decide_for(cls: type, vllm_config: Any) -> ModelFusion | None:
    """Decide for a model of ``cls``; None where it is not an entry class itself or must stay stock."""
    role = entry_roles().get(f"{cls.__module__}:{cls.__qualname__}")
    if role is None or vllm_config is None:
        return None
    source, load_config = checkpoint_of(role, vllm_config)
    decision = from_checkpoint(source, load_config, role)
    if decision.fuse and (refusal := next(refusals(decision, vllm_config, source, load_config), None)):
        reason, detail = refusal
        decision = dataclasses.replace(decision, fuse=False, reason=reason, detail=detail, fused_layers=())
    announce(decision)
    if not decision.fuse:
        return None
    family = family_of(decision.model_type)
    assert family is not None
    layers = vllm_config.model_config.hf_text_config.num_hidden_layers
    return ModelFusion(decision, TensorNaming(family, layers))


def checkpoint_of(role: Role, vllm_config: Any) -> tuple[Any, Any]:
    """Model and load configuration of a role: a draft may come from elsewhere, in another way."""
    speculative = vllm_config.speculative_config
    if role == "main" or speculative is None:
        return vllm_config.model_config, vllm_config.load_config
    return speculative.draft_model_config, speculative.draft_load_config or vllm_config.load_config


def from_checkpoint(model_config: Any, load_config: Any, role: Role) -> FusionDecision:
    """The decision that the checkpoint leads to; one that cannot be read is refused."""
    policy = load_policy(settings.load().policy_file)
    try:
        return decide(checkpoint_folder(model_config, load_config), ENGINE, role, policy)
    except FsePatchError as error:
        return FusionDecision(role, False, "evidence.unreadable", str(error), "", ENGINE, "")


def checkpoint_folder(model_config: Any, load_config: Any) -> Path:
    """The folder that vLLM loads from; a hub name is looked up in the local cache alone."""
    if Path(model_config.model).is_dir():
        return Path(model_config.model)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                model_config.model,
                revision=model_config.revision,
                cache_dir=load_config.download_dir,
                local_files_only=True,
            )
        )
    except Exception as error:
        raise FsePatchError(
            f"{model_config.model}: not a folder and not in the local hub cache; download it first"
        ) from error


def announce_other(cls: type) -> None:
    """Say of a model that is not an entry class that it stays stock."""
    if f"{cls.__module__}:{cls.__qualname__}" not in entry_roles():
        detail = f"{cls.__name__} is not a model class that fse_patch knows"
        announce(FusionDecision("main", False, "family.unknown", detail, "", ENGINE, ""))


def announce(decision: FusionDecision) -> None:
    """Record a decision, and say in one line a role: on and where, or why not."""
    runtime.record_decision(decision.to_dict())
    if decision.fuse:
        log.info("vllm, %s model: shared expert fused: %s", decision.role, decision.detail)
    else:
        log.warning("vllm, %s model: not fused: %s: %s", decision.role, decision.reason, decision.detail)
