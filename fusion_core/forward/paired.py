"""The paired forward of one layer: few tokens in one pass over weights that stay where the engine keeps them.

Nothing is copied or moved. Tensors are asked for at every call, because an engine may put others in their
place; only a captured graph keeps addresses, and those are compared after each update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import linear

from ..decision.outcome import MoeSpec, RoutingSpec
from ..kernels import pass_reference, routing_reference
from ..kernels.expert_weights import ExpertWeights, slots_of
from .paired_pass import run_pass
from .plan import ModeCounter
from .router import capturing, on_gpu

# Names of the two ways in counts and reports.
PAIRED, STOCK = "paired", "stock"


@dataclass(frozen=True)
class PairedWeights:
    """What the pass reads of one layer, as it is in memory now.

    Args:
        gate: [E, H] where the layer computes its own router logits; None where it is handed them.
        shared_gate: [1, H], or None where the shared expert weighs 1.
        correction_bias: [E], where the family has one.
        expert_map: [E] -> number among the experts of this process, -1 for one that is not here; None: all
            are.
        merged_slots: how many slots of ``routed`` hold the shared expert already; ``shared`` is None then.
    """

    routed: ExpertWeights
    shared: ExpertWeights | None
    gate: torch.Tensor | None = None
    shared_gate: torch.Tensor | None = None
    correction_bias: torch.Tensor | None = None
    expert_map: torch.Tensor | None = None
    merged_slots: int = 0

    @property
    def slots(self) -> range:
        """Return the ids that stand for the shared expert."""
        first = self.routed.w13.shape[0] - self.merged_slots
        return range(first, first + (self.merged_slots or self._shared_slots))

    def copy(self) -> PairedWeights:
        """Return the same in other memory."""

        def clone(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.detach().clone()

        def copied(weights: ExpertWeights) -> ExpertWeights:
            return replace(weights, w13=weights.w13.detach().clone(), w2=weights.w2.detach().clone())

        return replace(
            self,
            routed=copied(self.routed),
            shared=None if self.shared is None else copied(self.shared),
            gate=clone(self.gate),
            shared_gate=clone(self.shared_gate),
            correction_bias=clone(self.correction_bias),
        )

    @property
    def addresses(self) -> tuple[int, ...]:
        """Return where everything begins that a captured graph would hold."""
        others = (self.gate, self.shared_gate, self.correction_bias, self.expert_map)
        held = (0 if tensor is None else tensor.data_ptr() for tensor in others)
        shared = () if self.shared is None else _addresses(self.shared)
        return (*_addresses(self.routed), *shared, *held)

    @property
    def _shared_slots(self) -> int:
        return 0 if self.shared is None else slots_of(self.shared, self.routed.width)

    @property
    def formats(self) -> tuple[str, str]:
        """Name how routed and shared experts are stored, "" where the shared ones are among the routed."""
        return self.routed.format, "" if self.shared is None else self.shared.format


def _addresses(weights: ExpertWeights) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in weights.tensors)


@dataclass(frozen=True)
class OutputScale:
    """Factors of the sum, so that what the engine multiplies afterwards comes out right.

    Args:
        routed: of the weights of the routed experts.
        shared: of the weight of the shared expert.
    """

    routed: float = 1.0
    shared: float = 1.0


class PairedLayer:
    """One layer that runs paired for up to ``threshold`` tokens; 0, until it is proved: the engine runs all.

    Args:
        number: of the checkpoint.
        read: returns what is in memory now.
    """

    def __init__(
        self, number: int, moe: MoeSpec, read: Callable[[], PairedWeights], counter: ModeCounter
    ) -> None:
        self.number = number
        self.moe = moe
        self.read = read
        self.counter = counter
        self.threshold = 0
        # Addresses of the first call that a graph has captured.
        self.captured: tuple[int, ...] | None = None
        # Logits that stand in for those of the gate, and the factor of the shared weight: for proofs.
        self.given_logits: torch.Tensor | None = None
        self.control_factor = 1.0

    def runs(self, hidden_states: torch.Tensor) -> bool:
        """Return whether these states [num_tokens, H] run paired.

        The number of tokens is the host's: it is known when a graph is captured. Where Dynamo traces, it is a
        symbol, and the engine's own forward is traced.
        """
        return not torch.compiler.is_compiling() and 0 < hidden_states.shape[0] <= self.threshold

    def count(self, hidden_states: torch.Tensor) -> None:
        """Count a call of the layer, in the way that it runs."""
        if not torch.compiler.is_compiling():
            way = PAIRED if self.runs(hidden_states) else STOCK
            self.counter.add(self.number, way, capturing())

    def __call__(
        self,
        hidden_states: torch.Tensor,
        logits: torch.Tensor,
        scale: OutputScale,
        zeros: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute routed and shared experts of this process, summed: [num_tokens, H], before any reduction.

        Args:
            hidden_states: [num_tokens, H].
            logits: [num_tokens, E]; not looked at where the layer computes its own.
            zeros: a tensor like ``hidden_states`` that gets zeros, by a launch less than by itself.
        """
        held = self.read()
        if capturing() and self.captured is None:
            self.captured = held.addresses
        logits = self.logits(held, hidden_states, logits)
        weights, ids = self._route(held, hidden_states, logits, scale, zeros)
        return run_pass(hidden_states, held.routed, weights, ids, held.shared)

    def logits(self, held: PairedWeights, hidden_states: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return router logits as the pass uses them; arguments as of a call.

        Returns:
            [num_tokens, E]; on a GPU with the shared gate's in a last column, where the layer computes both.
        """
        given = self.given_logits
        if held.gate is None:
            return logits if given is None else given
        logits = _own_logits(held.gate, held.shared_gate, hidden_states)
        if given is not None:
            logits[:, : given.shape[1]] = given
        return logits

    def router_logits(self, held: PairedWeights, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the router's logits alone [num_tokens, E], by the gate that the pass reads."""
        logits = self.logits(held, hidden_states, hidden_states)
        return logits[:, : self.moe.layout.num_routed]

    def _route(
        self,
        held: PairedWeights,
        hidden_states: torch.Tensor,
        logits: torch.Tensor,
        scale: OutputScale,
        zeros: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``topk_weights`` float32 and ``topk_ids`` int32, both [num_tokens, k + S]."""
        layout = self.moe.layout
        spec = replace(self.moe.routing, routed_scaling_factor=scale.routed)
        if on_gpu(hidden_states):
            weights, ids = self._route_on_gpu(held, hidden_states, logits, spec, scale.shared, zeros)
            if self.control_factor != 1.0:
                weights[:, layout.top_k] *= self.control_factor
            return weights, ids
        if zeros is not None:
            zeros.zero_()
        gate = None if held.shared_gate is None else linear(hidden_states, held.shared_gate)
        weights, ids = routing_reference.route(logits, layout.top_k, spec, held.correction_bias)
        factor = scale.shared * self.control_factor
        slot_weight = factor if gate is None else gate.to(weights.dtype).sigmoid() * factor
        return routing_reference.append_shared_slots(
            weights, _local(ids, held.expert_map), held.slots, slot_weight
        )

    def _route_on_gpu(
        self,
        held: PairedWeights,
        hidden_states: torch.Tensor,
        logits: torch.Tensor,
        spec: RoutingSpec,
        factor: float,
        zeros: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route in one launch where all experts are here and all logits are there, otherwise in some more."""
        from ..kernels.append import append  # these need Triton
        from ..kernels.route import route

        layout, bias, gate = self.moe.layout, held.correction_bias, held.shared_gate
        whole = gate is None or held.gate is not None
        if held.expert_map is None and whole:
            return route(logits, layout.top_k, held.slots, spec, bias, factor, zeros)
        none = range(layout.num_routed, layout.num_routed)
        weights, ids = route(logits[:, : layout.num_routed], layout.top_k, none, spec, bias, zeros=zeros)
        shared = None if gate is None else linear(hidden_states, gate)
        return append(weights, _local(ids, held.expert_map), held.slots, shared, factor)

    def exact(self, hidden_states: torch.Tensor, logits: torch.Tensor, scale: OutputScale) -> torch.Tensor:
        """Compute the same in torch and at least in float32, routed by ``logits``, for proofs."""
        held = self.read()
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        states, spec = hidden_states.to(dtype), replace(self.moe.routing, routed_scaling_factor=scale.routed)
        weights, ids = routing_reference.route(logits, self.moe.layout.top_k, spec, held.correction_bias)
        gate = None if held.shared_gate is None else linear(states, held.shared_gate.to(dtype))
        slot_weight = scale.shared if gate is None else gate.sigmoid() * scale.shared
        weights, ids = routing_reference.append_shared_slots(
            weights, _local(ids, held.expert_map), held.slots, slot_weight
        )
        return pass_reference.experts_once(states, held.routed, weights, ids, held.shared)

    @contextmanager
    def weighted(self, factor: float) -> Iterator[None]:
        """Run with the weight of the first shared slot times ``factor``: the fault that a proof must see."""
        before, self.control_factor = self.control_factor, factor
        try:
            yield
        finally:
            self.control_factor = before

    @contextmanager
    def given(self, logits: torch.Tensor) -> Iterator[None]:
        """Route by ``logits`` [num_tokens, E] in place of the gate's, which are computed all the same."""
        before, self.given_logits = self.given_logits, logits
        try:
            yield
        finally:
            self.given_logits = before


def _own_logits(
    gate: torch.Tensor, shared_gate: torch.Tensor | None, hidden_states: torch.Tensor
) -> torch.Tensor:
    """Return router logits of a gate [E, H]; as of `PairedLayer.logits`."""
    if on_gpu(hidden_states):
        from ..kernels.router_logits import router_logits  # needs Triton

        return router_logits(hidden_states, gate, shared_gate)
    return linear(hidden_states.to(gate.dtype), gate)


def _local(ids: torch.Tensor, expert_map: torch.Tensor | None) -> torch.Tensor:
    return ids if expert_map is None else expert_map[ids.long()].to(ids.dtype)
