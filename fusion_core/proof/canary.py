"""Canary: one MoE layer as the checkpoint has it, computed in float64, to compare a fused forward with.

Written a second time on purpose: nothing of remapping or routing is shared with the code that it judges.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...errors import AuditError, NoReference
from ..decision.layout import ExpertLayout
from ..decision.outcome import MoeSpec, RoutingSpec
from .checkpoint_layer import E4M3_MAX, CheckpointLayer, Kernel, Round, as_it_is
from .rounding import Served, share_error, share_spread

# Tokens drawn at once, and how often: a token counts only if its choice of experts is no near tie.
DRAWN, ROUNDS = 64, 8
# Experts that the tokens choose in all; each costs three matrices read from the checkpoint.
EXPERTS = 16
# Kernels sum in any order: far above the noise of float32, far below any weight in a wrong place.
LEAST_TOLERANCE = 1e-4
# What the roundings of one forward may add up to, in that of a reference rounded at the same places.
ROUNDINGS = 4
# The same for activations in e4m3: hundreds of values err at once, and their sum is much the same every time.
KERNEL_ROUNDINGS = 2
# Above this, in several draws, roundings hide what is wrong: random states do not fit the scales.
MOST_NOISE, ATTEMPTS = 0.4, 3
# How many standard deviations the part of the rounding that looks like the shared expert may have.
SIGMAS = 6


class CanaryError(AuditError):
    """A fused layer does not compute what its checkpoint says: the model must not be served."""


@dataclass(frozen=True)
class Reference:
    """Hidden states, what the layer makes of them, and how far an answer may be from it.

    Args:
        hidden: [N, H], in the served dtype.
        output: [N, H] float64.
        shared: [N, H] float64, the shared expert's part of the output.
        tolerance: on the deviation of the whole output.
        share_tolerance: [N], by how much of itself the shared part may seem to be off; None where
            ``tolerance`` tells as much.
    """

    hidden: torch.Tensor
    output: torch.Tensor
    shared: torch.Tensor
    tolerance: float
    share_tolerance: torch.Tensor | None


@dataclass(frozen=True)
class Mode:
    """Way of computing the reference: how results are rounded, and how FP8 kernels round inputs."""

    round: Round
    kernel: Kernel | None = None


def choose(
    logits: torch.Tensor, top_k: int, spec: RoutingSpec, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the experts of each token by the family's definition, and say how clear the choice was.

    Args:
        logits: of the router, [N, E] float64.
        bias: correction bias, [E] float64, or None.

    Returns:
        Numbers of experts [N, k] int64, and margins [N] float64: by how much the last that was taken, expert
        or group, beats the first that was left, in the scores that choose; infinite where nothing was left.
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


def _steepness(spec: RoutingSpec) -> float:
    """Say how much of a logit's error may be in what `choose` compares: sigmoids are flat, groups add two."""
    if spec.scoring == "softmax":
        return 1.0
    return 0.5 if spec.num_expert_group > spec.topk_group else 0.25


def weigh(logits: torch.Tensor, ids: torch.Tensor, spec: RoutingSpec) -> torch.Tensor:
    """Weigh the chosen experts by the family's definition: [N, k] float64.

    Args:
        logits: of the router, [N, E] float64.
        ids: chosen experts, [N, k] int64.
    """
    weights = _scores(logits, spec).gather(1, ids)
    if spec.renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights * spec.routed_scaling_factor


def _scores(logits: torch.Tensor, spec: RoutingSpec) -> torch.Tensor:
    return torch.softmax(logits, dim=-1) if spec.scoring == "softmax" else torch.sigmoid(logits)


def reference(layer: CheckpointLayer, moe: MoeSpec, served: Served, seed: int = 0) -> Reference:
    """Draw hidden states whose choice of experts is clear, and compute the layer's output for them.

    The tolerance is `ROUNDINGS` times what rounding every intermediate result to the served dtype makes of
    the reference, and at least so many units in the last place, and `LEAST_TOLERANCE`. Where kernels round
    activations to FP8, it is at least `KERNEL_ROUNDINGS` times what that makes of the reference.

    Raises:
        NoReference: the checkpoint's tensors cannot tell.
    """
    for attempt in range(ATTEMPTS):
        drawn = _reference(layer, moe, served, seed + attempt)
        if drawn.tolerance < MOST_NOISE or drawn.share_tolerance is None:
            return drawn
    raise NoReference(f"rounding to FP8 alone may change {drawn.tolerance:.0%} of a random output")


def _reference(layer: CheckpointLayer, moe: MoeSpec, served: Served, seed: int) -> Reference:
    layout, routing = moe.layout, moe.routing
    gate = layer.read("gate.weight", served.gate)
    bias = layer.read("gate.e_score_correction_bias", served.bias) if routing.has_correction_bias else None
    hidden, ids = _clear_tokens(gate, bias, moe, served, seed, layer.input_scale)
    x = hidden.double()
    row = None
    if layer.shared_gate is not None:
        row = layer.read(f"{layer.shared_gate}.weight", served.shared_gate).reshape(1, -1)

    def rounded(value: torch.Tensor) -> torch.Tensor:
        return value.to(served.dtype).double()

    kernels = layer.kernels(served.ue8m0)
    modes = [Mode(as_it_is), Mode(rounded), *(Mode(rounded, kernel) for kernel in kernels)]
    ways = {kernel.weights for kernel in kernels}
    # Of every token, the weight of each routed expert, and in the last column that of the shared one.
    shares = []
    for mode in modes:
        routed = torch.zeros(len(x), layout.num_routed, dtype=x.dtype, device="cpu")
        routed = routed.scatter(1, ids, weigh(mode.round(x @ gate.T), ids, routing))
        shared = torch.ones_like(routed[:, :1]) if row is None else torch.sigmoid(mode.round(x @ row.T))
        shares.append(torch.cat([routed, shared], dim=1))
    users: dict[int | None, torch.Tensor] = {
        expert: (ids == expert).any(dim=1) for expert in sorted(set(ids.flatten().tolist()))
    }
    users[None] = torch.ones_like(ids[:, 0], dtype=torch.bool)
    # Of each mode and expert: what goes into the down projection.
    inner: list[list[torch.Tensor]] = [[] for _ in modes]
    states = [mode.kernel.before(x) if mode.kernel else x for mode in modes]
    for expert, mine in users.items():
        held = dict(zip(("gate_proj", "up_proj"), layer.gate_up(expert, served.dtype), strict=True))
        exact = [_product(matrix, x[mine]) for matrix in held.values()]
        as_served = {way: [way(expert, name, matrix) for name, matrix in held.items()] for way in ways}
        for mode, rows, parts in zip(modes, states, inner, strict=True):
            pre = exact
            if mode.kernel:
                pre = [_product(matrix, rows[mine]) for matrix in as_served[mode.kernel.weights]]
            before, up = map(mode.round, pre)
            parts.append(mode.round(before * torch.sigmoid(before) * up))
    inner = [_as_kernels_read(mode, parts, layout) for mode, parts in zip(modes, inner, strict=True)]
    outputs = [torch.zeros_like(x) for _ in modes]
    for number, (expert, mine) in enumerate(users.items()):
        column, down = -1 if expert is None else expert, layer.down(expert, served.dtype)
        downs = {way: way(expert, "down_proj", down) for way in ways}
        for mode, parts, share, output in zip(modes, inner, shares, outputs, strict=True):
            matrix = downs[mode.kernel.weights] if mode.kernel else down
            output[mine] += share[mine, column, None] * mode.round(_product(matrix, parts[number]))
    # The shared expert came last, with the down projection that is still there.
    shared = shares[0][:, -1:] * _product(down, inner[0][-1])
    errors = [rounded(output) - outputs[0] for output in outputs[1:]]
    return Reference(hidden, outputs[0], shared, *_tolerances(outputs[0], shared, errors, served))


def _tolerances(
    exact: torch.Tensor, shared: torch.Tensor, errors: list[torch.Tensor], served: Served
) -> tuple[float, torch.Tensor | None]:
    """Find the tolerances of the output and of the shared expert's share in it.

    Args:
        errors: what rounding to the served dtype makes of the output, then what each way of the kernels does.
    """
    least = max(LEAST_TOLERANCE, ROUNDINGS * served.unit)
    plain, *kernels = (deviation(exact + error, exact) for error in errors)
    tolerance = max(least, ROUNDINGS * plain, *(KERNEL_ROUNDINGS * noise for noise in kernels))
    if not kernels:
        return tolerance, None
    seeming = [torch.full_like(exact[:, 0], least)]
    for error in errors[1:]:
        seeming += [ROUNDINGS * share_error(error, shared).abs(), SIGMAS * share_spread(error, shared)]
    return tolerance, torch.stack(seeming).amax(dim=0)


def _as_kernels_read(mode: Mode, parts: list[torch.Tensor], layout: ExpertLayout) -> list[torch.Tensor]:
    """Round what goes into the down projections: each slot's part is a row, and all rows go in at once."""
    if not mode.kernel:
        return parts
    rows = torch.cat([part.reshape(-1, layout.moe_intermediate_size) for part in parts])
    sizes = [part.numel() // layout.moe_intermediate_size for part in parts]
    split = torch.split(mode.kernel.between(rows), sizes)
    return [values.reshape(part.shape) for values, part in zip(split, parts, strict=True)]


def _clear_tokens(
    gate: torch.Tensor,
    bias: torch.Tensor | None,
    moe: MoeSpec,
    served: Served,
    seed: int,
    input_scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw hidden states [N, H], and the experts [N, k] that they choose whatever rounding does to logits."""
    layout, routing = moe.layout, moe.routing
    enough = max(2, EXPERTS // layout.top_k)
    # Random numbers reach 4 standard deviations: a static scale must not cut them off.
    size = 1.0 if input_scale is None else min(1.0, E4M3_MAX * input_scale / 8)
    draw = torch.Generator("cpu").manual_seed(seed)
    tokens, chosen = torch.empty(0), torch.empty(0)
    for _ in range(ROUNDS):
        # An engine that loads has its own default dtype and device.
        drawn = torch.randn(DRAWN, gate.shape[1], generator=draw, dtype=torch.float32, device="cpu")
        drawn = (size * drawn).to(served.dtype)
        logits = drawn.double() @ gate.T
        ids, margin = choose(logits, layout.top_k, routing, bias)
        clear = margin > 2 * _steepness(routing) * ROUNDINGS * served.gate_unit * logits.abs().amax(dim=1)
        tokens = torch.cat([tokens, drawn[clear]]) if len(tokens) else drawn[clear]
        chosen = torch.cat([chosen, ids[clear]]) if len(chosen) else ids[clear]
        if len(tokens) >= enough:
            break
    if not len(tokens):
        raise NoReference("no random token chooses its experts clearly")
    return tokens[:enough], chosen[:enough]


def _product(matrix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    # Row by row: a product with a matrix of a few rows takes ten times as long.
    return torch.stack([matrix @ row for row in rows])


def deviation(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Measure how far the worst token of ``output`` is off, relative to its size; inf for NaN.

    Args:
        output: [N, H] of any dtype, on any device.
        expected: [N, H] float64, in the host's memory.
    """
    size = expected.norm(dim=-1).clamp_min(torch.finfo(expected.dtype).tiny)
    worst = float(((output.to("cpu", expected.dtype) - expected).norm(dim=-1) / size).max())
    return worst if worst == worst else float("inf")


def judge(role: str, layer: int, expected: Reference, output: torch.Tensor) -> float:
    """Return the deviation of a fused layer's output [N, H], of any dtype.

    Raises:
        CanaryError: it is not what the checkpoint says.
    """
    if output.shape != expected.output.shape:
        raise CanaryError(f"{role} model: layer {layer} gives {list(output.shape)}; the model is not served")
    off = deviation(output, expected.output)
    where = f"{role} model: canary: layer {layer}"
    if not off <= expected.tolerance:
        raise CanaryError(
            f"{where} is {off:.2g} off what the checkpoint says, relative to its output; "
            f"{expected.tolerance:.2g} is allowed; the model is not served"
        )
    if expected.share_tolerance is not None:
        share = share_error(output.to("cpu", torch.float64) - expected.output, expected.shared)
        worst = int((share.abs() / expected.share_tolerance).argmax())
        if not share[worst].abs() <= expected.share_tolerance[worst]:
            raise CanaryError(
                f"{where} has {1 + share[worst]:.3g} times the shared expert's part, "
                f"{expected.share_tolerance[worst]:.2g} is allowed; the model is not served"
            )
    return off
