"""A layer of vLLM that runs paired: its runner's forward below the opaque operator, weights where they lie.

That operator returns a pair, of the shared and of the routed experts. The sum of both goes into the one that
vLLM does not scale afterwards, zeros into the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import linear

from ...errors import FsePatchError
from ...fusion_core.forward.paired import OutputScale, PairedWeights
from ...fusion_core.kernels.expert_weights import Block, ExpertWeights
from .. import int4_reading
from ..expert_reading import dense_scales, dense_weights, experts_of, routed_of
from ..paired import EngineLayer, PairedRole
from .int4 import int4_backend, int4_experts
from .plan import built_backend
from .role import LAYER

# Backends that keep rows of gate before rows of up, as they were loaded.
READABLE = frozenset({"triton", "deepgemm", "vllm_cutlass"}) | int4_reading.READABLE


def pair_block(role: PairedRole, block: Any) -> None:
    """Let a block that vLLM has built run paired, where its layer is one of ``role``."""
    match = LAYER.search(getattr(getattr(block, "experts", None), "layer_name", ""))
    number = int(match[1]) if match else -1
    # A block that inherits its constructor comes here twice.
    if number in role.start.decision.moe.layers and number not in role.layers:
        role.take(number, lambda: RunnerLayer(number, role, block))


class RunnerLayer(EngineLayer):
    """One MoERunner of vLLM, and the block around it."""

    readable = READABLE

    def __init__(self, number: int, role: PairedRole, block: Any) -> None:
        super().__init__(number, role)
        self.block = block
        self.runner: Any = block.experts
        self.spec = role.start.decision.moe.routing
        self.shared = self.runner._shared_experts
        if self.shared is None:
            raise FsePatchError(f"layer {number}: vLLM has built no shared expert beside its experts")
        self.stock_forward = self.runner._forward_impl
        self.runner._forward_impl = self.forward

    def forward(
        self, hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Run in place of the runner's ``_forward_impl``: few tokens paired, all others untouched."""
        self.layer.count(hidden_states)
        if self.layer.runs(hidden_states):
            return self._paired(hidden_states, router_logits)
        return self.stock_forward(hidden_states, router_logits, *args, **kwargs)

    def _paired(
        self, hidden_states: torch.Tensor, router_logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        none = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
        total = self.layer(hidden_states, router_logits, self.scale(hidden_states), none)
        return (none, total) if self._shared_is_divided(hidden_states) else (total, none)

    def _shared_is_divided(self, hidden_states: torch.Tensor) -> bool:
        """Tell if vLLM divides the shared experts by the scale, in place of scaling the routed ones."""
        return hidden_states.dtype == torch.float16 and self.runner.routed_scaling_factor != 1.0

    def scale(self, hidden_states: torch.Tensor) -> OutputScale:
        """Return the factors of the sum; in float16 vLLM serves routed + shared / scale."""
        if self._shared_is_divided(hidden_states):
            return OutputScale(shared=1.0 / self.runner.routed_scaling_factor)
        return OutputScale(routed=self.spec.routed_scaling_factor)

    def in_memory(self) -> PairedWeights:
        """Return what is in memory now, whoever runs it."""
        experts, mlp = self.runner.routed_experts, self.shared._layer
        gate, shared_gate = self.runner.gate, getattr(mlp, "expert_gate", None)
        bias = getattr(experts, "e_score_correction_bias", None)
        if self.spec.has_correction_bias and bias is None:
            bias = self.block.gate.e_score_correction_bias
        return PairedWeights(
            routed=int4_experts(experts) or routed_of(experts, _block(experts.quant_method)),
            shared=_shared(mlp),
            gate=None if gate is None else gate.weight,
            shared_gate=None if shared_gate is None else shared_gate.weight,
            correction_bias=bias,
            expert_map=experts.expert_map,
        )

    def copy(self) -> None:
        """Copy what was loaded first: an update passes through modules that vLLM has packed by then."""
        if self.copied is None:
            super().copy()

    def parameters(self) -> Iterable[torch.Tensor]:
        """Yield parameters of both kinds of experts."""
        yield from self.runner.routed_experts.parameters()
        yield from self.shared._layer.parameters()

    def stock(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Run the runner's own forward, routed by ``logits``."""
        with self._given(logits):
            return self._sum(self.stock_forward(hidden_states, logits, hidden_states))

    def ours(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Run the paired forward, routed by ``logits``."""
        with self.layer.given(logits):
            return self._sum(self._paired(hidden_states, logits))

    def _sum(self, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Add both parts as the runner does behind the operator, without its reduction."""
        shared, routed = self.runner._maybe_apply_routed_scale_to_output(*pair)
        total: torch.Tensor = shared + routed
        return total

    @contextmanager
    def _given(self, logits: torch.Tensor) -> Iterator[None]:
        """Let the runner's own gate answer ``logits``, after it was computed."""
        gate = self.runner.gate
        if gate is None:
            yield
            return
        self.runner.gate = _Given(gate, logits)
        try:
            yield
        finally:
            self.runner.gate = gate

    def gates(self, hidden_states: torch.Tensor) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """Yield logits of the gates that the pass reads, and of vLLM's modules."""
        now = self.read()
        if now.gate is not None:
            yield self.layer.router_logits(now, hidden_states), self.engine_logits(hidden_states)
        if now.shared_gate is not None:
            gate = self.shared._layer.expert_gate
            yield linear(hidden_states, now.shared_gate), gate(hidden_states)[0]

    def engine_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return router logits by vLLM's gate, which some blocks call before the runner."""
        gate = self.block.gate if self.runner.gate is None else self.runner.gate
        answer: Any = gate(hidden_states.to(self.logits_dtype))
        logits: torch.Tensor = answer[0] if isinstance(answer, tuple) else answer
        return logits

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of hidden states."""
        dtype: torch.dtype = self.runner.moe_config.in_dtype
        return dtype

    @property
    def logits_dtype(self) -> torch.dtype:
        """Return the dtype that vLLM routes by: GLM's gate is in float32, Qwen's in the model's dtype."""
        return torch.float32 if self.spec.scoring == "sigmoid" else self.dtype

    @property
    def backend(self) -> str:
        """Return the backend that the layer was built with."""
        experts = self.runner.routed_experts
        if experts.quant_method.is_monolithic:
            return "a monolithic kernel"
        return int4_backend(experts) or built_backend(self.runner)


class _Given(torch.nn.Module):
    """A gate that computes, and then answers something else."""

    def __init__(self, gate: Any, logits: torch.Tensor) -> None:
        super().__init__()
        self.gate, self.logits = gate, logits

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
        self.gate(hidden_states)
        return self.logits, None


def _shared(mlp: Any) -> ExpertWeights:
    up, down = mlp.gate_up_proj, mlp.down_proj
    width, hidden = int(down.input_size_per_partition), int(down.output_size)
    w13, w2 = dense_weights(up, down)
    w13, w2 = _rows(w13, 2 * width, hidden), _rows(w2, hidden, width)
    return experts_of(w13, w2, dense_scales(up, down), _block(up.quant_method))


def _rows(weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return a weight as [rows, columns]: some kernels keep it the other way round."""
    if rows != columns and tuple(weight.shape) == (columns, rows):
        return weight.t()
    if rows == columns and weight.stride(-1) != 1:
        return weight.t()
    return weight


def _block(method: Any) -> Block | None:
    block = getattr(method, "weight_block_size", None)
    return None if block is None else (int(block[0]), int(block[1]))
