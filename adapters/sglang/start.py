"""The decision for one role, made when SGLang instantiates its model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from ...fusion_core.checkpoint.families import family_of
from ...fusion_core.checkpoint.naming import TensorNaming
from ...fusion_core.decision.native import gets_wrong
from ...fusion_core.decision.outcome import FusionDecision
from ...fusion_core.forward.plan import ModePlan
from ..refusals import online, refusal
from ..start import Refusal, announce_other, checkpoint_folder, config_difference, proof, role_of, settle
from . import native
from .native import ENGINE
from .plan import native_plan, plan_of
from .role import ModelFusion, NativeFusion

log = logging.getLogger("fse_patch")
UPSTREAM: Final = "upstream.already"
# Loaders that pass every checkpoint tensor by its name through `load_weights`, or none at all.
LOAD_FORMATS = {"auto", "safetensors", "fastsafetensors", "runai_streamer", "pt", "npcache", "dummy"}
# Backends whose top-k comes in the standard format; others route by themselves or take no more columns.
RUNNERS = {"auto", "triton"}
# Switches of its TopK, which not every mode asks.
SIMULATORS = ("SGLANG_SIMULATE_UNIFORM_EXPERTS", "SGLANG_SIMULATE_ROUND_ROBIN_EXPERTS")


def decide_for(
    model_config: Any, load_config: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[ModelFusion | None, type | None]:
    """Decide for the model that is about to be instantiated.

    Returns:
        How it is fused, or None where it stays as SGLang builds it; and its class, if SGLang's own fusion
        has to be switched off for it.
    """
    from sglang.srt.model_loader.utils import get_model_architecture

    cls = get_model_architecture(model_config)[0]
    role = role_of(ENGINE, cls)
    if role is None:
        announce_other(ENGINE, cls)
        return None, None
    quantised = args[0] if args else kwargs.get("quant_config")
    family = family_of(model_config.hf_text_config.model_type)
    own = None if family is None else native.live(cls, family.name, model_config, quantised)

    def must_go(decision: FusionDecision) -> bool:
        return own is not None and bool(gets_wrong(own, decision))

    def locate() -> Path:
        return checkpoint_folder(model_config.model_path, model_config.revision, load_config.download_dir)

    def forbidden(decision: FusionDecision) -> Iterator[Refusal]:
        yield from refusals(decision, model_config, load_config, quantised, own)
        plan, why = plan_of(decision, model_config)
        if plan is None:
            yield refusal(why)

    def beside(decision: FusionDecision) -> ModePlan | None:
        """Modes for what SGLang fuses by itself, where nothing else forbids them."""
        if decision.reason != UPSTREAM:
            return None
        others = refusals(decision, model_config, load_config, quantised, own)
        return native_plan(decision, model_config) if {code for code, _ in others} == {UPSTREAM} else None

    def remark(decision: FusionDecision) -> str:
        if must_go(decision):
            return "; SGLang's own fusion is switched off"
        plan = beside(decision)
        return f"; modes by number of tokens, fused is SGLang's own: {plan} ({plan.source})" if plan else ""

    decision = settle(ENGINE, role, locate, forbidden, remark)
    off = cls if must_go(decision) else None
    plan = plan_of(decision, model_config)[0] if decision.fuse else beside(decision)
    if plan is None:
        return None, off
    assert family is not None
    naming = TensorNaming(family, model_config.hf_text_config.num_hidden_layers)
    fusion = (ModelFusion if decision.fuse else NativeFusion)(decision, naming, locate())
    fusion.plan = plan
    if decision.fuse and native.platform() == "cuda":
        log.info("%s model: modes by number of tokens: %s (%s)", role, plan, plan.source)
    return fusion, off


def refusals(
    decision: FusionDecision,
    model_config: Any,
    load_config: Any,
    quantised: object,
    own: dict[str, Any] | None,
) -> Iterator[Refusal]:
    """What of the runtime configuration forbids to fuse, first reason first.

    Args:
        own: SGLang's own fusion, where it is live; see `native.live`.
    """
    from sglang.srt.environ import envs
    from sglang.srt.layers.moe import get_moe_a2a_backend, get_moe_runner_backend
    from sglang.srt.runtime_context import get_server_args

    server = get_server_args()
    if server.disable_shared_experts_fusion:
        yield "disabled", "--disable-shared-experts-fusion is given"
    if own is not None and not gets_wrong(own, decision):
        yield UPSTREAM, "SGLang fuses this model by itself here"
    if server.ep_size > 1 or not get_moe_a2a_backend().is_none():
        yield "parallel.ep", "expert parallelism is on; run without --ep-size and --moe-a2a-backend"
    if server.enable_eplb or server.ep_num_redundant_experts:
        yield "parallel.eplb", "the expert load balancer is on; run without --enable-eplb"
    if server.dp_size > 1 or server.enable_dp_attention:
        yield "parallel.dp", f"data parallelism is on (--dp-size {server.dp_size}); run without it"
    if server.pp_size > 1:
        yield "parallel.pp", f"pipeline parallelism is on (--pp-size {server.pp_size}); run without it"
    if server.enable_lora or server.lora_paths:
        yield "lora", "LoRA is enabled; run without --enable-lora and --lora-paths"
    runner = get_moe_runner_backend().value
    if runner not in RUNNERS:
        yield (
            "backend.topk_format",
            f"--moe-runner-backend is {runner}; use one of {', '.join(sorted(RUNNERS))}",
        )
    if server.kt_weight_path is not None:
        yield "backend.routing", "KTransformers runs experts by their number; run without --kt-weight-path"
    if server.enable_return_routed_experts or server.expert_distribution_recorder_mode:
        yield (
            "routing.capture",
            "routed experts are recorded; run without --enable-return-routed-experts "
            "and --expert-distribution-recorder-mode",
        )
    if any(setting is not None and setting.get() for setting in (getattr(envs, n, None) for n in SIMULATORS)):
        yield "routing.simulator", f"one of {', '.join(SIMULATORS)} is set; unset it"
    load_format = getattr(load_config.load_format, "value", load_config.load_format)
    if load_format not in LOAD_FORMATS:
        yield "load.format", f"--load-format is {load_format}; use auto or safetensors"
    yield from online(decision, model_config.quantization, quantised)
    if differing := config_difference(decision, model_config.hf_text_config):
        yield "config.differs", f"{differing}; run without overrides of the MoE configuration"
    yield from proof(decision, native.platform())
