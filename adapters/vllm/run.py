"""Router logits inside the layer, where a block computes them before it (Qwen2-MoE, GLM-4).

Few tokens then need one launch for them, and GLM-4 no copy of its states in float32.

vLLM's MoE runner with three ways to run a fused layer, on CUDA.

Its `_forward_impl` runs inside an opaque operator there: what it does by the number of tokens is legal under
torch.compile, and fixed in each captured graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from ...errors import FsePatchError
from ...fusion_core.forward.gate_rows import GateRows
from ...fusion_core.forward.plan import ModePlan
from ...fusion_core.forward.router import FusedRouter
from ..role import ModelFusion
from .experts import Experts
from .formats import ExpertFormat, dense_kernels, format_of
from .fp8 import Fp8Experts
from .plan import KNOWN_BACKENDS, built_backend

if TYPE_CHECKING:
    from ...fusion_core.forward.layer import LayerExecution  # needs Triton
if TYPE_CHECKING:
    from ...fusion_core.forward.layer import LayerExecution

# MERGED adapters/vllm/own_gate.py


def take_gate(block: Any, execution: LayerExecution) -> None:
    """Let ``execution`` compute the logits of ``block``, whose forward then hands on its states alone.

    Its own forward is known by its fingerprint: logits of the states in the gate's dtype, then the layer.
    """
    gate, shared_gate = block.gate, execution.shared_gate

    def logits(hidden_states: torch.Tensor) -> torch.Tensor:
        found: Any = gate(hidden_states.to(gate.weight.dtype))
        out: torch.Tensor = found[0] if isinstance(found, tuple) else found
        return out

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        states = hidden_states.view(-1, hidden_states.shape[-1])
        out: torch.Tensor = block.experts(hidden_states=states, router_logits=states)
        return out.view(hidden_states.shape)

    rows = GateRows([gate] if shared_gate is None else [gate, shared_gate])
    execution.compute_logits(rows, logits, before_shared=True)
    block.forward = forward


# MERGED adapters/vllm/runner.py


@cache
def runner_class() -> type[Any]:
    """The subclass of the installed release's MoERunner."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    class FusedRunner(MoERunner):  # type: ignore[misc]
        """A runner whose experts hold the shared expert; ``execute`` is its `LayerExecution`."""

        def __init__(self, *args: Any, make: Callable[[Any], LayerExecution], **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.execute = make(self)

        def _forward_impl(
            self,
            hidden_states: torch.Tensor,
            router_logits: torch.Tensor,
            shared_experts_input: torch.Tensor | None,
            input_ids: torch.Tensor | None = None,
        ) -> torch.Tensor:
            return self.execute(hidden_states, router_logits)

    return FusedRunner


def stock_router(kwargs: dict[str, Any]) -> Any:
    """The router that stock would build from the factory's arguments, its scale in the weights."""
    from vllm.model_executor.layers.fused_moe.router.router_factory import create_fused_moe_router

    taken = (
        "top_k",
        "renormalize",
        "use_grouped_topk",
        "num_expert_group",
        "topk_group",
        "scoring_func",
        "routed_scaling_factor",
        "e_score_correction_bias",
    )
    given = {name: kwargs[name] for name in taken if name in kwargs}
    return create_fused_moe_router(global_num_experts=kwargs["num_experts"], **given)


def execution_of(
    router: FusedRouter, plan: ModePlan, form: ExpertFormat, stock: Any, shared_gate: Any
) -> Callable[[Any], LayerExecution]:
    """What makes the execution of a layer, as soon as its runner has its experts and its gate.

    Args:
        stock: see `stock_router`.
        shared_gate: the module of the shared expert's gate, or None.
    """

    from ...fusion_core.forward.layer import LayerExecution  # needs Triton

    def make(runner: Any) -> LayerExecution:
        experts = Experts(runner.routed_experts, stock)
        if built_backend(runner) not in KNOWN_BACKENDS:
            raise FsePatchError(f"{runner.layer_name}: vLLM took the MoE backend {built_backend(runner)!r}")
        quantised = quantised_of(form, runner.routed_experts, router.layout.num_routed)
        if runner.gate is None:
            return LayerExecution(router, plan, experts, None, None, shared_gate, quantised)
        gates = GateRows([runner.gate] if shared_gate is None else [runner.gate, shared_gate])
        return LayerExecution(
            router, plan, experts, gates, lambda states: runner.gate(states)[0], shared_gate, quantised
        )

    return make


def quantised_of(form: ExpertFormat, experts: Any, slot: int) -> Any:
    """The `QuantisedExperts` of a layer, None where its experts are plain."""
    if not form.scale:
        return None
    _, hidden, width = experts.w2_weight.shape
    return Fp8Experts(experts, form.scale, form.block, dense_kernels(form, hidden, width), slot)


def several_modes(
    fusion: ModelFusion, router: FusedRouter, shared_gate: Any, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of the layer factory that let a layer run in several modes: known formats, on CUDA."""
    from vllm.config import get_current_vllm_config
    from vllm.platforms import current_platform

    form = format_of(fusion.decision, get_current_vllm_config()) if current_platform.is_cuda() else None
    if form is None:
        return {}
    assert fusion.plan is not None
    make = execution_of(router, fusion.plan, form, stock_router(kwargs), shared_gate)
    return {"runner_cls": runner_class(), "runner_args": {"make": make}}
