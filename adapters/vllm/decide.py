"""The decision for one role, made when vLLM starts to build its model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from ... import settings
from ...fusion_core.decision import FusionDecision
from ...fusion_core.families import Role, family_of
from ...fusion_core.naming import TensorNaming
from .. import ledger
from ..deciding import Refusal, checkpoint_folder, config_difference, settle
from .fusion import ModelFusion

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
    model_config, load_config = vllm_config.model_config, vllm_config.load_config
    source = model_config if role == "main" else vllm_config.speculative_config.draft_model_config
    decision = settle(
        ENGINE,
        role,
        lambda: checkpoint_folder(source.model, source.revision, load_config.download_dir),
        lambda decision: refusals(decision, vllm_config),
    )
    if not decision.fuse:
        return None
    family = family_of(decision.model_type)
    assert family is not None
    return ModelFusion(decision, TensorNaming(family, model_config.hf_text_config.num_hidden_layers))


def refusals(decision: FusionDecision, vllm_config: Any) -> Iterator[Refusal]:
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
