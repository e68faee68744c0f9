"""The canary: one MoE layer as the checkpoint has it, computed in float64, to compare a fused forward with.

Written a second time on purpose: nothing of remapping or routing is shared with the code that it judges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import AuditError, FsePatchError
from .decision import FusionDecision, RoutingSpec
from .naming import TensorNaming
from .specs import ALL_EXPERTS
from .tensors import CheckpointTensors

# Tokens drawn at once, and how often: a token counts only if its choice of experts is no near tie.
DRAWN, ROUNDS = 64, 8
# Experts that the tokens choose in all; each costs three matrices read from the checkpoint.
EXPERTS = 16
# Half a unit in the last place: 2^-p for a significand of p bits (IEEE 754; bfloat16 has 8 of them).
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# TF32, which GPUs may multiply float32 in, keeps a significand of 11 bits.
TF32_UNIT = 2.0**-11
# Kernels sum in any order: far above the noise of float32, far below any weight in a wrong place.
LEAST_TOLERANCE = 1e-4
# What the roundings of one forward may add up to, in that of a reference rounded at the same places.
ROUNDINGS = 4

Round = Callable[[torch.Tensor], torch.Tensor]
Mlp = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class NoReference(FsePatchError):
    """The checkpoint's tensors do not say what the layer computes; the text says why."""


class CanaryError(AuditError):
    """A fused layer does not compute what its checkpoint says: the model must not be served."""


@dataclass(frozen=True)
class Served:
    """In which dtypes the engine holds a layer: its experts and hidden states, gate, bias and shared gate."""

    dtype: torch.dtype
    gate: torch.dtype
    bias: torch.dtype
    shared_gate: torch.dtype
    device: str = "cpu"

    @property
    def unit(self) -> float:
        """Relative size of one rounding."""
        float32_on_gpu = self.dtype == torch.float32 and self.device != "cpu"
        return TF32_UNIT if float32_on_gpu else UNIT[self.dtype]


@dataclass(frozen=True)
class Reference:
    """Hidden states, what the layer makes of them, and how far an answer may be from it."""

    hidden: torch.Tensor
    output: torch.Tensor
    tolerance: float


class CheckpointLayer:
    """The tensors of one MoE layer, by what they are for; in float64, rounded as the engine holds them.

    Raises:
        NoReference: the checkpoint's safetensors files do not hold the layer, or not as plain weights.
    """

    def __init__(
        self, tensors: CheckpointTensors, naming: TensorNaming, decision: FusionDecision, layer: int
    ) -> None:
        self.tensors = tensors
        self.names: dict[tuple[int | None, str], str] = {}
        for name in self.tensors.names():
            # Most names are another layer's, and parsing takes longer than this.
            ref = naming.parse(name) if f".{layer}.mlp." in name else None
            if ref is not None and ref.layer == layer and ref.role == decision.role:
                if ref.suffix != "weight":
                    raise NoReference(f"{name}: the canary reads plain weights only")
                self.names[ref.expert, ref.projection] = name
        if not self.names:
            raise NoReference("the checkpoint has no safetensors files with this layer")
        self.block = next(iter(self.names.values())).rpartition(".mlp.")[0] + ".mlp."
        # Memory of the last expert's weights, used again: getting new memory takes longer than to fill it.
        self._held: dict[str, torch.Tensor] = {}

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of the block, outside its experts."""
        if self.block + name not in self.tensors:
            raise NoReference(f"the checkpoint has no {self.block}{name}")
        return self.tensors.read(self.block + name).to(dtype).double()

    def mlp(self, expert: int | None, dtype: torch.dtype) -> Mlp:
        """Gate, up and down projection of an expert, None for the shared one; good until the next call."""
        if expert is not None and (ALL_EXPERTS, "down_proj") in self.names:
            gate, up = self._weight(ALL_EXPERTS, "gate_up_proj", dtype, expert).chunk(2)
            return gate, up, self._weight(ALL_EXPERTS, "down_proj", dtype, expert)
        gate, up, down = (self._weight(expert, p, dtype) for p in ("gate_proj", "up_proj", "down_proj"))
        return gate, up, down

    def _weight(
        self, expert: int | None, projection: str, dtype: torch.dtype, row: int | None = None
    ) -> torch.Tensor:
        name = self.names.get((expert, projection))
        if name is None:
            raise NoReference(f"the checkpoint has no {projection} of expert {expert} in {self.block}")
        weight = self.tensors.read(name, row)
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise NoReference(f"{name}: the canary reads plain weights only")
        held = self._held.get(projection)
        if held is None or held.shape != weight.shape:
            held = self._held[projection] = torch.empty(weight.shape, dtype=torch.float64, device="cpu")
        return held.copy_(weight.to(dtype))


def choose(
    logits: torch.Tensor, top_k: int, spec: RoutingSpec, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts [N, k] of each token by the family's definition, and how clear the choice was.

    The margin [N] is by how much the last that was taken, expert or group, beats the first that was left, in
    the scores that choose; infinite where nothing was left.
    """
    margin = torch.full_like(logits[:, 0], float("inf"))
    choice = logits if spec.scoring == "softmax" else _scores(logits, spec)
    if bias is not None:
        choice = choice + bias
    if spec.num_expert_group > spec.topk_group:
        groups = choice.reshape(len(choice), spec.num_expert_group, -1)
        best = groups.sort(dim=-1, descending=True).values[..., : 1 if bias is None else 2].sum(dim=-1)
        marks, order = best.sort(dim=-1, descending=True)
        margin = marks[:, spec.topk_group - 1] - marks[:, spec.topk_group]
        lost = order[:, spec.topk_group :, None].expand(-1, -1, groups.shape[-1])
        choice = groups.scatter(1, lost, float("-inf")).flatten(1)
    values, order = choice.sort(dim=-1, descending=True)
    if top_k < choice.shape[1]:
        margin = torch.minimum(margin, values[:, top_k - 1] - values[:, top_k])
    return order[:, :top_k], margin


def weigh(logits: torch.Tensor, ids: torch.Tensor, spec: RoutingSpec) -> torch.Tensor:
    """The weights [N, k] of chosen experts by the family's definition."""
    weights = _scores(logits, spec).gather(1, ids)
    if spec.renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights * spec.routed_scaling_factor


def _scores(logits: torch.Tensor, spec: RoutingSpec) -> torch.Tensor:
    return torch.softmax(logits, dim=-1) if spec.scoring == "softmax" else torch.sigmoid(logits)


def reference(layer: CheckpointLayer, decision: FusionDecision, served: Served, seed: int = 0) -> Reference:
    """Random hidden states whose choice of experts is clear, and the layer's output for them.

    The tolerance is `ROUNDINGS` times what rounding every intermediate result to the served dtype makes of
    the reference, and at least so many units in the last place, and `LEAST_TOLERANCE`.

    Raises:
        NoReference: the checkpoint's tensors cannot tell.
    """
    layout, routing = decision.layout, decision.routing
    assert layout is not None
    assert routing is not None
    gate = layer.read("gate.weight", served.gate)
    bias = layer.read("gate.e_score_correction_bias", served.bias) if routing.has_correction_bias else None
    hidden, ids = _clear_tokens(gate, bias, decision, served, seed)
    x = hidden.double()
    row = None
    if decision.shared_weight == "sigmoid_gate":
        row = layer.read("shared_expert_gate.weight", served.shared_gate).reshape(1, -1)

    def rounded(value: torch.Tensor) -> torch.Tensor:
        return value.to(served.dtype).double()

    # Of every token, the weight of each routed expert, and in the last column that of the shared one.
    modes: tuple[Round, Round] = (lambda value: value, rounded)
    shares = []
    for mode in modes:
        routed = torch.zeros(len(x), layout.num_routed, dtype=x.dtype, device="cpu")
        routed = routed.scatter(1, ids, weigh(mode(x @ gate.T), ids, routing))
        shared = torch.ones_like(routed[:, :1]) if row is None else torch.sigmoid(mode(x @ row.T))
        shares.append(torch.cat([routed, shared], dim=1))
    outputs = [torch.zeros_like(x) for _ in modes]
    for expert in [*sorted(set(ids.flatten().tolist())), None]:
        column = -1 if expert is None else expert
        users = torch.ones_like(ids[:, 0], dtype=torch.bool) if expert is None else (ids == expert).any(dim=1)
        answers = _mlp(x[users], layer.mlp(expert, served.dtype), modes)
        for answer, share, output in zip(answers, shares, outputs, strict=True):
            output[users] += share[users, column, None] * answer
    exact, inexact = outputs
    noise = ROUNDINGS * deviation(rounded(inexact), exact)
    return Reference(hidden, exact, max(LEAST_TOLERANCE, ROUNDINGS * served.unit, noise))


def _clear_tokens(
    gate: torch.Tensor, bias: torch.Tensor | None, decision: FusionDecision, served: Served, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random hidden states, [N, H], and the experts that they choose whatever rounding does to the logits."""
    layout, routing = decision.layout, decision.routing
    assert layout is not None
    assert routing is not None
    wanted = max(2, EXPERTS // layout.top_k)
    draw = torch.Generator("cpu").manual_seed(seed)
    tokens, chosen = torch.empty(0), torch.empty(0)
    for _ in range(ROUNDS):
        # An engine that loads has its own default dtype and device.
        drawn = torch.randn(DRAWN, gate.shape[1], generator=draw, dtype=torch.float32, device="cpu")
        drawn = drawn.to(served.dtype)
        logits = drawn.double() @ gate.T
        ids, margin = choose(logits, layout.top_k, routing, bias)
        clear = margin > 2 * ROUNDINGS * served.unit * logits.abs().amax(dim=1)
        tokens = torch.cat([tokens, drawn[clear]]) if len(tokens) else drawn[clear]
        chosen = torch.cat([chosen, ids[clear]]) if len(chosen) else ids[clear]
        if len(tokens) >= wanted:
            break
    if not len(tokens):
        raise NoReference("no random token chooses its experts clearly")
    return tokens[:wanted], chosen[:wanted]


def _mlp(x: torch.Tensor, weights: Mlp, modes: tuple[Round, ...]) -> list[torch.Tensor]:
    """An expert's output, rounded in each of the modes."""
    w1, w3, w2 = weights
    gate, up = _product(w1, x), _product(w3, x)
    inner = [mode(mode(gate) * torch.sigmoid(mode(gate)) * mode(up)) for mode in modes]
    return [mode(_product(w2, value)) for mode, value in zip(modes, inner, strict=True)]


def _product(matrix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    # Row by row: a product with a matrix of a few rows takes ten times as long.
    return torch.stack([matrix @ row for row in rows])


def deviation(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Distance of ``output`` from ``expected`` relative to its size, of the worst token; inf for NaN."""
    size = expected.norm(dim=-1).clamp_min(torch.finfo(expected.dtype).tiny)
    worst = float(((output.to("cpu", expected.dtype) - expected).norm(dim=-1) / size).max())
    return worst if worst == worst else float("inf")


def judge(role: str, layer: int, wanted: Reference, output: torch.Tensor) -> float:
    """The deviation of a fused layer's output.

    Raises:
        CanaryError: it is not what the checkpoint says.
    """
    if output.shape != wanted.output.shape:
        raise CanaryError(f"{role} model: layer {layer} gives {list(output.shape)}; the model is not served")
    found = deviation(output, wanted.output)
    if found <= wanted.tolerance:
        return found
    raise CanaryError(
        f"{role} model: canary: layer {layer} is {found:.2g} off what the checkpoint says, relative to its "
        f"output; {wanted.tolerance:.2g} is allowed; the model is not served"
    )
