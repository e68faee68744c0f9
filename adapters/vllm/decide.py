"""The decision for one role, made when vLLM starts to build its model: checkpoint first, then runtime."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
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
from ...fusion_core.reasons import Reason
from .. import ledger
from .fusion import ModelFusion

log = logging.getLogger("fse_patch")
ENGINE = "vllm"
# Loaders that pass every checkpoint tensor by its name through `load_weights`, or none at all.
LOAD_FORMATS = {"auto", "hf", "safetensors", "fastsafetensors", "runai_streamer", "pt", "npcache", "dummy"}


@cache
def entry_roles() -> dict[str, Role]:
    """Role of each entry class, by ``module:class``."""
    return dict(ledger.load(ENGINE).roles)


def decide_for(cls: type, vllm_config: Any) -> ModelFusion | None:
    """Decide for a model of ``cls``; None where it is not an entry class itself or must stay stock."""
    role = entry_roles().get(f"{cls.__module__}:{cls.__qualname__}")
    if role is None or vllm_config is None:
        return None
    model_config = vllm_config.model_config
    source = model_config if role == "main" else vllm_config.speculative_config.draft_model_config
    decision = from_checkpoint(source, vllm_config.load_config, role)
    if decision.fuse and (refusal := next(refusals(decision, vllm_config), None)):
        reason, detail = refusal
        decision = dataclasses.replace(decision, fuse=False, reason=reason, detail=detail, fused_layers=())
    announce(decision)
    if not decision.fuse:
        return None
    family = family_of(decision.model_type)
    assert family is not None
    return ModelFusion(decision, TensorNaming(family, model_config.hf_text_config.num_hidden_layers))


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


def refusals(decision: FusionDecision, vllm_config: Any) -> Iterator[tuple[Reason, str]]:
    """What of the runtime configuration forbids to fuse, first reason first."""
    from vllm import envs
    from vllm.platforms import current_platform

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if differing := config_difference(decision, model.hf_text_config):
        yield "config.differs", f"{differing}; run without overrides of the MoE configuration"
    if parallel.enable_expert_parallel:
        yield "parallel.ep", "expert parallelism is on; run without --enable-expert-parallel"
    if parallel.enable_eplb:
        yield "parallel.eplb", "the expert load balancer is on; run without --enable-eplb"
    if parallel.data_parallel_size > 1:
        yield "parallel.dp", f"data_parallel_size is {parallel.data_parallel_size}; run with 1"
    if vllm_config.lora_config is not None:
        yield "lora", "LoRA is enabled; run without --enable-lora"
    outputs = getattr(vllm_config, "aux_output_config", model)
    if getattr(outputs, "enable_return_routed_experts", False):
        yield "routing.capture", "routed experts are captured; run without --enable-return-routed-experts"
    if envs.VLLM_MOE_ROUTING_SIMULATION_STRATEGY:
        yield "routing.simulator", "VLLM_MOE_ROUTING_SIMULATION_STRATEGY is set; unset it"
    if vllm_config.load_config.load_format not in LOAD_FORMATS:
        yield "load.format", f"load_format is {vllm_config.load_config.load_format}; use auto or safetensors"
    if vllm_config.quant_config is not None and decision.rule.startswith("unquantised"):
        yield (
            "quant.online",
            f"the checkpoint is quantised on the fly ({model.quantization}); load it as it is",
        )
    if not current_platform.is_cpu() and not settings.load().allow_unmeasured:
        yield "slower.unmeasured", "no measurement shows that fusing is not slower here"


def config_difference(decision: FusionDecision, config: Any) -> str:
    """How the configuration that runs differs from the one that was decided on, or ""."""
    family, layout, routing = family_of(decision.model_type), decision.layout, decision.routing
    assert family is not None
    assert layout is not None
    assert routing is not None
    expected = {
        family.num_experts_key: layout.num_routed,
        family.top_k_key: layout.top_k,
        "hidden_size": layout.hidden_size,
        "moe_intermediate_size": layout.moe_intermediate_size,
        "norm_topk_prob": routing.renormalize,
        "routed_scaling_factor": routing.routed_scaling_factor,
    }
    seen = {name: getattr(config, name, value) for name, value in expected.items()}
    return "; ".join(
        f"{n} is {seen[n]!r}, config.json says {v!r}" for n, v in expected.items() if seen[n] != v
    )


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
