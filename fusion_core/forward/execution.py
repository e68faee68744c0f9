"""Execution of one fused layer, in the mode that its plan has for the number of tokens.

No mode waits for the GPU or allocates anything whose size depends on values there, so each can be captured in
a CUDA graph; the mode is chosen by a number that the host knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import torch

from ..kernels.append import append
from ..kernels.expert_weights import ExpertWeights
from ..kernels.route import route
from ..kernels.router_logits import router_logits
from .gate_rows import GateRows
from .mode_registry import MODES, Mode
from .plan import ModePlan
from .router import FusedRouter

TopK = tuple[torch.Tensor, torch.Tensor]


class GroupedExperts(Protocol):
    """An engine's part of one layer: its experts and how it runs them."""

    @property
    def w13(self) -> torch.Tensor:
        """Return [E + S, 2 * I, H], as loaded."""

    @property
    def w2(self) -> torch.Tensor:
        """Return [E + S, H, I], as loaded."""

    def gemm(
        self, hidden_states: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, top_k: TopK
    ) -> torch.Tensor:
        """Run the grouped GEMM over these experts: [num_tokens, H], in memory that the caller may change."""

    def choose(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> TopK:
        """Route as stock does over E experts, its scale in the weights: k columns."""

    def side_stream(self, num_tokens: int) -> torch.cuda.Stream | None:
        """Return the stream that stock runs the shared expert on for so many tokens; None: in turn."""


class QuantisedExperts(Protocol):
    """Products with w13 and w2 where these are quantised; results have the states' dtype."""

    def weights(self) -> ExpertWeights:
        """Return the weights of experts and slots."""

    def gate_up(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Multiply by w13 of the one shared slot: [num_tokens, 2 * I]."""

    def down(self, inner: torch.Tensor) -> torch.Tensor:
        """Multiply inner states [num_tokens, I] by w2 of the one shared slot: [num_tokens, H]."""


class Execution:
    """The way one layer runs.

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
        # In place of the plan's choice; set by `FusedLayer.forced` alone.
        self.forced: Mode | None = None
        self._run = {name: mode.load() for name, mode in MODES.items()}
        if gate is not None:
            self.compute_logits(gate, gate_linear)

    def compute_logits(
        self,
        gate: GateRows,
        gate_linear: Callable[[torch.Tensor], torch.Tensor] | None,
        before_shared: bool = False,
    ) -> None:
        """Let the layer compute its own logits from now on; arguments as of the class.

        Args:
            before_shared: stock's shared expert starts after them, and not beside them.

        Raises:
            ValueError: one of both forms is missing, or rows of the shared gate.
        """
        rows = self.layout.num_routed + (self.shared_gate is not None)
        if gate_linear is None or gate.count != rows:
            raise ValueError(f"a layer with gates of its own needs both forms of them, and {rows} rows")
        self.gate, self.gate_linear, self.logits_first = gate, gate_linear, before_shared

    def mode_of(self, num_tokens: int) -> Mode:
        """Return the mode that runs ``num_tokens``."""
        return self.forced or self.plan.mode_of(num_tokens)

    def __call__(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Compute the layer's output [num_tokens, H], in new memory.

        Args:
            hidden_states: [num_tokens, H], contiguous, bfloat16 or float16 on a GPU.
            logits: [num_tokens, E], any float dtype; not looked at where the layer computes its own.
        """
        mode = self.mode_of(hidden_states.shape[0])
        self.router.enter(mode)
        if not len(hidden_states):
            return torch.empty_like(hidden_states)  # nothing to launch, and no kernel takes an empty grid
        output: torch.Tensor = self._run[mode](self, hidden_states, logits)
        return output

    def route(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> TopK:
        """Choose and weigh k + S columns in one or two launches.

        Args:
            hidden_states: [num_tokens, H].
            logits: [num_tokens, E], or E + 1 with the shared gate's where the layer computes its own.

        Returns:
            ``topk_weights`` float32 and ``topk_ids`` int32, both [num_tokens, k + S].
        """
        layout, router = self.layout, self.router
        spec, bias, slots = router.routing, router.correction_bias, layout.shared_slots
        if self.gate is not None or self.shared_gate is None:
            weights, ids = route(logits, layout.top_k, slots, spec, bias)
        else:
            none = range(layout.num_routed, layout.num_routed)
            weights, ids = route(logits, layout.top_k, none, spec, bias)
            gate = torch.nn.functional.linear(hidden_states, self.gate_row())
            weights, ids = append(weights, ids, slots, gate)
        if (factor := router.control_factor) != 1.0:
            weights[:, layout.top_k] *= factor
        return weights, ids

    def route_few(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> TopK:
        """Do the same for few tokens, by a kernel, where the layer computes its own logits."""
        if self.gate is not None:
            logits = router_logits(hidden_states, self.gate.rows)
        return self.route(hidden_states, logits)

    def expert_weights(self) -> ExpertWeights:
        """Return the weights of experts and slots, as the kernels for few tokens read them."""
        if self.quantised is not None:
            return self.quantised.weights()
        return ExpertWeights(self.experts.w13, self.experts.w2)

    def gate_row(self) -> torch.Tensor:
        """Return the shared gate's weight [1, H]. Asked for anew: an engine may put another in its place."""
        return cast(torch.Tensor, cast(torch.nn.Module, self.shared_gate).weight)
