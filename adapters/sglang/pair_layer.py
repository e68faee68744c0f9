"""A block of SGLang whose layer runs paired: its weights as SGLang keeps them, and both arms of a proof."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import linear

from ...fusion_core.decision.outcome import MoeSpec
from ...fusion_core.forward.paired import PAIRED, STOCK, OutputScale, PairedWeights
from ...fusion_core.kernels.expert_weights import Block, ExpertWeights
from .. import int4_reading
from ..expert_reading import Unreadable, dense_scales, dense_weights, experts_of, routed_of
from ..paired import EngineLayer, PairedRole
from .int4 import int4_backend, int4_experts
from .role import refresh_gate

READABLE = frozenset({"triton"}) | int4_reading.READABLE


class BlockLayer(EngineLayer):
    """One sparse block of SGLang."""

    readable = READABLE
    # Which arm runs in a proof, and the logits that it routes by.
    arm = ""
    given: torch.Tensor | None = None

    def __init__(self, number: int, role: PairedRole, block: Any) -> None:
        super().__init__(number, role)
        family = role.start.decision.family
        self.block = block
        self.moe: MoeSpec = role.start.decision.moe
        self.mlp: Any = getattr(block, family.shared_module, None)
        self.shared_gate = None if family.shared_gate is None else getattr(block, family.shared_gate)
        self._map: torch.Tensor | None = None
        self.gate = block.gate.forward
        self.replace(block.gate, "forward", self.answer)
        self.replace(block, "_forward_shared_experts", self._shared_experts)
        self.replace(block, "forward_normal_dual_stream", self._dual_stream)

    def replace(self, owner: Any, name: str, ours: Callable[..., Any]) -> None:
        """Put ``ours`` in place of a method of a module; it is called with the original first.

        Where Dynamo traces, it traces the original: the number of tokens is a symbol there.
        """
        original = getattr(owner, name)

        def replacement(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return original(*args, **kwargs)
            return ours(original, *args, **kwargs)

        setattr(owner, name, replacement)

    def runs(self, hidden_states: torch.Tensor) -> bool:
        """Return whether these states [num_tokens, H] run paired."""
        if self.arm:
            return self.arm == PAIRED
        return self.layer.runs(hidden_states)

    def answer(self, original: Callable[..., Any], hidden_states: torch.Tensor) -> Any:
        """Answer as the gate does; in a proof by the given logits, after it was computed."""
        answer = original(hidden_states)
        if self.given is None:
            return answer
        return (self.given, *answer[1:]) if isinstance(answer, tuple) else self.given

    def _shared_experts(
        self, original: Callable[..., Any], hidden_states: torch.Tensor, *args: Any, **kw: Any
    ) -> Any:
        return None if self.runs(hidden_states) else original(hidden_states, *args, **kw)

    def _dual_stream(
        self, original: Callable[..., Any], hidden_states: torch.Tensor, *args: Any, **kw: Any
    ) -> Any:
        raise NotImplementedError

    def total(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Run the pass; where SGLang hands logits in a proof, by those."""
        self.layer.given_logits = self.given
        try:
            return self.layer(hidden_states, hidden_states, self.scale(hidden_states))
        finally:
            self.layer.given_logits = None

    def scale(self, hidden_states: torch.Tensor) -> OutputScale:
        """Return the factors of the sum: what SGLang multiplies it by afterwards is taken out."""
        factor = self.moe.routing.routed_scaling_factor
        return OutputScale(routed=factor / self.after, shared=1.0 / self.after)

    def in_memory(self) -> PairedWeights:
        """Return what is in memory now, whoever runs it."""
        block, experts = self.block, self.block.experts
        if self.mlp is None and experts.moe_ep_size > 1:
            raise Unreadable("each process has the shared slots, and SGLang divides their weight")
        return PairedWeights(
            routed=int4_experts(experts) or routed_of(experts, _block(experts.quant_method)),
            shared=None if self.mlp is None else _shared(self.mlp),
            gate=block.gate.weight,
            shared_gate=None if self.shared_gate is None else self.shared_gate.weight,
            correction_bias=getattr(block.gate, "e_score_correction_bias", None),
            expert_map=self._expert_map(experts),
            merged_slots=experts.num_fused_shared_experts if self.mlp is None else 0,
        )

    def _expert_map(self, experts: Any) -> torch.Tensor | None:
        """Return each routed expert's number among those of this process, as SGLang's dispatcher has it."""
        if experts.moe_ep_size == 1:
            return None
        if self._map is None:
            local = experts.num_local_experts - experts.num_fused_shared_experts
            first = experts.moe_ep_rank * local
            total = self.moe.layout.num_routed
            numbers = torch.arange(-first, total - first, dtype=torch.int32)
            here = (numbers >= 0) & (numbers < local)
            self._map = torch.where(here, numbers, -1).to(experts.w13_weight.device)
        return self._map

    @torch.inference_mode()  # what a proof makes can be written in no other mode
    def refresh(self) -> None:
        """Renew the float32 copy that GLM's gate keeps: above the threshold SGLang routes by it."""
        refresh_gate(self.block.gate)

    def parameters(self) -> Iterable[torch.Tensor]:
        """Yield parameters of the block."""
        parameters: Iterable[torch.Tensor] = self.block.parameters()
        return parameters

    def stock(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Run SGLang's own block, routed by ``logits``, without the sum over processes."""
        return self._run(STOCK, hidden_states, logits)

    def ours(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Run the paired forward in the same way."""
        return self._run(PAIRED, hidden_states, logits)

    def _run(self, arm: str, hidden_states: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        self.arm, self.given = arm, logits
        try:
            with unreduced(self.block):
                total: torch.Tensor = self.block(hidden_states)
        finally:
            self.arm, self.given = "", None
        return total

    def gates(self, hidden_states: torch.Tensor) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """Yield logits of the gates that the pass reads, and of SGLang's modules."""
        now = self.read()
        yield self.layer.router_logits(now, hidden_states), self.engine_logits(hidden_states)
        if now.shared_gate is not None and self.shared_gate is not None:
            yield linear(hidden_states, now.shared_gate), _first(self.shared_gate(hidden_states))

    def engine_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return router logits by SGLang's gate."""
        return _first(self.gate(hidden_states))

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of hidden states."""
        dtype: torch.dtype = self.block.experts.moe_runner_config.params_dtype
        return dtype

    @property
    def logits_dtype(self) -> torch.dtype:
        """Return the dtype that SGLang routes by: GLM's gate is in float32, Qwen's in the model's dtype."""
        return torch.float32 if self.moe.routing.scoring == "sigmoid" else self.dtype

    @property
    def backend(self) -> str:
        """Return the runner's word for who runs the experts; "" where there is no such runner."""
        if packed := int4_backend(self.block.experts):
            return packed
        runner = getattr(self.block.experts.quant_method, "runner", None)
        return "" if runner is None else str(runner.runner_backend.value)


@contextmanager
def unreduced(block: Any) -> Iterator[None]:
    """Let a block leave out its sum over processes."""
    told = {"tp_size": 1, "reduce_results": False}
    before = {name: vars(block)[name] for name in told if name in vars(block)}
    for name in before:
        setattr(block, name, told[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(block, name, value)


def _first(answer: Any) -> torch.Tensor:
    logits: torch.Tensor = answer[0] if isinstance(answer, tuple) else answer
    return logits


def _shared(mlp: Any) -> ExpertWeights:
    up, down = mlp.gate_up_proj, mlp.down_proj
    w13, w2 = dense_weights(up, down)
    return experts_of(_rows(w13), _rows(w2), dense_scales(up, down), _block(up.quant_method))


def _rows(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight as [rows, columns]: some kernels keep it the other way round."""
    return weight.t() if weight.ndim == 2 and weight.stride(-1) != 1 else weight


def _block(method: Any) -> Block | None:
    block = getattr(getattr(method, "quant_config", None), "weight_block_size", None)
    return None if block is None else (int(block[0]), int(block[1]))
