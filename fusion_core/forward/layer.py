"""One fused layer, run in the mode that its plan has for the number of tokens. Knows no engine by name.

No mode waits for the GPU or allocates anything whose size depends on values there, so each can be captured in
a CUDA graph; the mode is chosen by a number that the host knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import torch

from ..kernels.append import append
from ..kernels.experts import small_experts
from ..kernels.route import route
from ..kernels.router_logits import router_logits
from ..kernels.silu_mul import silu_mul
from .gate_rows import GateRows
from .plan import Mode, ModePlan
from .router import FusedRouter

TopK = tuple[torch.Tensor, torch.Tensor]


class GroupedExperts(Protocol):
    """What an engine has to give of one layer."""

    @property
    def w13(self) -> torch.Tensor:
        """[E + S, 2 * I, H], as loaded."""

    @property
    def w2(self) -> torch.Tensor:
        """[E + S, H, I], as loaded."""

    def gemm(
        self, hidden_states: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, top_k: TopK
    ) -> torch.Tensor:
        """The grouped GEMM over these experts; the result is the caller's own, [num_tokens, H]."""

    def choose(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> TopK:
        """Stock's own routing over E experts, its scale in the weights: k columns."""

    def side_stream(self, num_tokens: int) -> torch.cuda.Stream | None:
        """The stream that stock runs the shared expert on for so many tokens; None: in turn."""


class QuantisedExperts(Protocol):
    """What stands for products with w13 and w2 where they are quantised; results have the states' dtype."""

    def small(self, hidden_states: torch.Tensor, top_k: TopK) -> torch.Tensor:
        """Few tokens over k + S slots: [num_tokens, H]."""

    def gate_up(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """w13 of the one shared slot: [num_tokens, 2 * I]."""

    def down(self, inner: torch.Tensor) -> torch.Tensor:
        """w2 of the one shared slot, of inner states [num_tokens, I]: [num_tokens, H]."""


class LayerExecution:
    """Runs one layer.

    Args:
        router: routing and audit of the layer.
        plan: which mode when.
        gate: both gates where the layer computes its own logits, of E experts and perhaps the shared gate;
            None where it is handed logits of E experts.
        gate_linear: router logits [num_tokens, E], as stock computes them, where the layer computes its own.
        shared_gate: module of the shared expert's gate, with a weight [1, H], or None.
        quantised: None where the weights are plain ones.
    """

    def __init__(
        self,
        router: FusedRouter,
        plan: ModePlan,
        experts: GroupedExperts,
        gate: GateRows | None,
        gate_linear: Callable[[torch.Tensor], torch.Tensor] | None,
        shared_gate: torch.nn.Module | None,
        quantised: QuantisedExperts | None = None,
    ) -> None:
        self.router = router
        self.plan = plan
        self.experts = experts
        self.gate: GateRows | None = None
        self.gate_linear: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.logits_first = False
        self.shared_gate = shared_gate
        self.quantised = quantised
        self.layout = router.layout
        # In place of the plan's choice: each mode is proved before anything is served.
        self.forced: Mode | None = None
        if gate is not None:
            self.compute_logits(gate, gate_linear)

    def compute_logits(
        self,
        gate: GateRows,
        gate_linear: Callable[[torch.Tensor], torch.Tensor] | None,
        before_shared: bool = False,
    ) -> None:
        """From now on the layer computes its own logits; arguments as of the class.

        Args:
            before_shared: stock's shared expert starts after them, and not beside them.

        Raises:
            ValueError: one of both forms is missing, or rows of the shared gate.
        """
        rows = self.layout.num_routed + (self.shared_gate is not None)
        if gate_linear is None or gate.count != rows:
            raise ValueError(f"a layer with gates of its own needs both forms of them, and {rows} rows")
        self.gate, self.gate_linear, self.logits_first = gate, gate_linear, before_shared

    def __call__(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The layer's output [num_tokens, H], new memory.

        Args:
            hidden_states: [num_tokens, H], contiguous.
            logits: [num_tokens, E]; not looked at where the layer computes its own.
        """
        mode = self.forced or self.plan.mode_of(hidden_states.shape[0])
        self.router.enter(mode)
        if not len(hidden_states):
            return torch.empty_like(hidden_states)  # nothing to launch, and no kernel takes an empty grid
        if mode == "split":
            return self._split(hidden_states, logits)
        weights, ids = self._route(hidden_states, logits, mode)
        if (factor := self.router.control_factor) != 1.0:
            weights[:, self.layout.top_k] *= factor
        w13, w2 = self.experts.w13, self.experts.w2
        if mode == "small":
            if self.quantised is not None:
                return self.quantised.small(hidden_states, (weights, ids))
            return small_experts(hidden_states, w13, w2, weights, ids)
        return self.experts.gemm(hidden_states, w13, w2, (weights, ids))

    def _route(self, hidden_states: torch.Tensor, logits: torch.Tensor, mode: Mode) -> TopK:
        """k + S columns in one or two launches."""
        layout, router = self.layout, self.router
        spec, bias, slots = router.routing, router.correction_bias, layout.shared_slots
        if self.gate is not None:
            if mode == "small":
                logits = router_logits(hidden_states, self.gate.rows)
            elif self.gate_linear is not None and self.shared_gate is None:
                # As stock has them: GLM's are float32, and in 16 bit two that are close may change places.
                logits = self.gate_linear(hidden_states)
            else:
                # The columns beyond E + G are of the alignment; routing reads the first ones of each row.
                logits = torch.nn.functional.linear(hidden_states, self.gate.padded)[:, : self.gate.count]
            return route(logits, layout.top_k, slots, spec, bias)
        if self.shared_gate is None:
            return route(logits, layout.top_k, slots, spec, bias)
        none = range(layout.num_routed, layout.num_routed)
        weights, ids = route(logits, layout.top_k, none, spec, bias)
        gate = torch.nn.functional.linear(hidden_states, self._gate_row(self.shared_gate))
        return append(weights, ids, slots, gate)

    def _split(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Stock's way on views: grouped GEMM over k, the dense MLP beside it or after it."""
        routed, experts = self.layout.num_routed, self.experts
        stream = experts.side_stream(hidden_states.shape[0])
        if self.gate_linear is not None and self.logits_first:
            logits = self.gate_linear(hidden_states)
        if stream is not None:
            # From here on the shared expert may run. It is waited for below, before any memory is given away.
            stream.wait_stream(torch.cuda.current_stream())
        if self.gate_linear is not None and not self.logits_first:
            logits = self.gate_linear(hidden_states)
        top_k = experts.choose(hidden_states, logits)
        out = experts.gemm(hidden_states, experts.w13[:routed], experts.w2[:routed], top_k)
        if stream is None:
            if self.quantised is not None:
                return out.add_(self._shared(hidden_states))
            return out.addmm_(self._inner(hidden_states), experts.w2[routed].T)
        with torch.cuda.stream(stream):
            shared = self._shared(hidden_states)
        torch.cuda.current_stream().wait_stream(stream)
        return out.add_(shared)

    def _shared(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The shared expert's part of the output, [num_tokens, H]."""
        inner = self._inner(hidden_states)
        if self.quantised is not None:
            return self.quantised.down(inner)
        return inner @ self.experts.w2[self.layout.num_routed].T

    def _inner(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Inner states of the shared expert, [num_tokens, I], its weight in them."""
        if self.quantised is not None:
            gate_up = self.quantised.gate_up(hidden_states)
        else:
            gate_up = torch.nn.functional.linear(hidden_states, self.experts.w13[self.layout.num_routed])
        factor = self.router.control_factor
        if self.shared_gate is None:
            return silu_mul(gate_up, factor=factor)
        return silu_mul(gate_up, hidden_states, self._gate_row(self.shared_gate), factor)

    @staticmethod
    def _gate_row(module: torch.nn.Module) -> torch.Tensor:
        """Asked for anew: an engine may put another parameter in the place of one."""
        return cast(torch.Tensor, module.weight)
