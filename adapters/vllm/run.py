"""How a fused layer runs in vLLM on CUDA: its MoE runner, in one of several modes.

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
from ...fusion_core.forward.router import FusedRouter
from ..start import Start
from .experts import Experts
from .formats import ExpertFormat, dense_kernels
from .fp8 import Fp8Experts
from .plan import KNOWN_BACKENDS, built_backend

if TYPE_CHECKING:
    from ...fusion_core.forward.execution import Execution  # needs Triton


def runner_arguments(
    start: Start, router: FusedRouter, shared_gate: Any, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return arguments of the layer factory that let a layer run in several modes; none where it has one.

    Args:
        kwargs: those that the block passes.
    """
    if start.expert_format is None:
        return {}
    make = execution_of(start, start.expert_format, router, stock_router(kwargs), shared_gate)
    return {"runner_cls": runner_class(), "runner_args": {"make": make}}


@cache
def runner_class() -> type[Any]:
    """Return the subclass of the installed release's MoERunner."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    class FusedRunner(MoERunner):  # type: ignore[misc]
        """A runner whose experts hold the shared expert; ``execute`` is its `Execution`."""

        def __init__(self, *args: Any, make: Callable[[Any], Execution], **kwargs: Any) -> None:
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
    """Return the router that stock would build from the factory's arguments, its scale in the weights."""
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
    start: Start, form: ExpertFormat, router: FusedRouter, stock: Any, shared_gate: Any
) -> Callable[[Any], Execution]:
    """Return what makes the execution of a layer, as soon as its runner has its experts and its gate.

    Args:
        stock: stock's router of that layer.
        shared_gate: the module of the shared expert's gate, or None.
    """

    from ...fusion_core.forward.execution import Execution  # needs Triton

    def make(runner: Any) -> Execution:
        experts = Experts(runner.routed_experts, stock)
        if built_backend(runner) not in KNOWN_BACKENDS:
            raise FsePatchError(f"{runner.layer_name}: vLLM took the MoE backend {built_backend(runner)!r}")
        quantised = quantised_of(form, runner.routed_experts, router.layout.num_routed)
        if runner.gate is None:
            return Execution(router, start.plan, experts, None, None, shared_gate, quantised)
        gates = GateRows([runner.gate] if shared_gate is None else [runner.gate, shared_gate])
        return Execution(
            router, start.plan, experts, gates, lambda states: runner.gate(states)[0], shared_gate, quantised
        )

    return make


def quantised_of(form: ExpertFormat, experts: Any, slot: int) -> Any:
    """Return the `QuantisedExperts` of a layer, None where its experts are plain."""
    if not form.scale:
        return None
    _, hidden, width = experts.w2_weight.shape
    return Fp8Experts(experts, form.scale, form.block, dense_kernels(form, hidden, width), slot)


def take_gate(block: Any, execution: Execution) -> None:
    """Let ``execution`` compute the router logits of ``block``, whose forward then hands on its states alone.

    For blocks that compute them before the layer (Qwen2-MoE, GLM-4): few tokens then need one launch for
    them, and GLM-4 no copy of its states in float32.

    Its own forward is known by its fingerprint: logits of the states in the gate's dtype, then the layer.
    """
    gate, shared_gate = block.gate, execution.shared_gate

    def logits(hidden_states: torch.Tensor) -> torch.Tensor:
        answer: Any = gate(hidden_states.to(gate.weight.dtype))
        router_logits: torch.Tensor = answer[0] if isinstance(answer, tuple) else answer
        return router_logits

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        states = hidden_states.view(-1, hidden_states.shape[-1])
        out: torch.Tensor = block.experts(hidden_states=states, router_logits=states)
        return out.view(hidden_states.shape)

    rows = GateRows([gate] if shared_gate is None else [gate, shared_gate])
    execution.compute_logits(rows, logits, before_shared=True)
    block.forward = forward
