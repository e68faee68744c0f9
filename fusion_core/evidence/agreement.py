"""Comparison of what config.json says of one layer's experts with what their headers show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..checkpoint.config import MoeConfig
from ..checkpoint.headers import TensorHeader
from ..checkpoint.naming import Projection
from ..quant.claims import PLAIN, Claim, Doubt, Resolver, all_plain
from ..quant.layouts import contradiction, foreign
from ..quant.methods import LAYOUTS
from .specs import ALL_EXPERTS, Tensors, projection_shapes, sizes_differ

# agrees: config and headers say the same, and the same of routed and shared experts.
# differs: they say the same, but the config says one thing of routed and another of shared experts; or it is
# not understood, and sizes of packed weights differ.
State = Literal["agrees", "differs", "contradicts", "unknown"]
Part = Literal["routed", "shared"]
PARTS: tuple[Part, Part] = ("routed", "shared")


@dataclass(frozen=True)
class MlpClaim:
    """Claims of the config on an expert's two fused projections."""

    gate_up: Claim
    down: Claim

    def __str__(self) -> str:
        if self.gate_up == self.down:
            return str(self.gate_up)
        return f"gate and up {self.gate_up}; down {self.down}"


@dataclass(frozen=True)
class Agreement:
    """Verdict on one layer; ``detail`` says what is not as it should be.

    ``routed`` and ``shared`` are None where the config's words are not understood; ``sizes`` says what of
    packed weights has another size in one part than in the other.
    """

    state: State
    detail: str = ""
    routed: MlpClaim | None = None
    shared: MlpClaim | None = None
    sizes: str = ""

    @property
    def alike(self) -> bool | None:
        """Tell if the config says the same of both parts; None where it is not understood, or wrong."""
        if self.routed is None or self.shared is None:
            return None
        alike = self.routed == self.shared
        # What it says of one part alone is not so: nobody knows which.
        return None if self.state == "contradicts" and not alike else alike

    @property
    def format(self) -> str:
        """Name the format of the routed experts by config, or "" where that is not understood."""
        return self.routed.gate_up.format if self.routed else ""


def agreement(
    parts: Mapping[Part, Tensors], modules: Mapping[Part, str], resolve: Resolver, moe: MoeConfig
) -> Agreement:
    """Compare claims and headers of one layer.

    Args:
        parts: headers of the routed experts, all stored alike, and of the shared one.
        modules: dotted name of the module that holds each part, such as "model.layers.0.mlp.experts".
    """
    sizes = sizes_differ(parts["routed"], parts["shared"], moe.num_shared_slots)
    claims: dict[Part, MlpClaim] = {}
    try:
        for part in PARTS:
            claims[part] = _claims(part, parts[part], modules[part], resolve)
    except Doubt as doubt:
        return Agreement("differs", sizes, sizes=sizes) if sizes else Agreement("unknown", str(doubt))
    routed, shared = claims["routed"], claims["shared"]
    for part in PARTS:
        width = moe.moe_intermediate_size if part == "routed" else moe.shared_intermediate_size
        state, detail = _compare(parts[part], claims[part], width, moe.hidden_size, part == "routed")
        if state != "agrees":
            return Agreement(state, f"{part}: {detail}", routed, shared, sizes)
    if routed != shared:
        return Agreement("differs", f"routed {routed}, shared {shared}", routed, shared, sizes)
    return Agreement("agrees", "", routed, shared, sizes)


def cut_across(claims: MlpClaim, width: int) -> str:
    """Say why a shared expert cannot be cut into slots of ``width`` columns, or ""."""
    for projection, claim, size in (
        ("gate_up", claims.gate_up, claims.gate_up.group[0]),
        ("down", claims.down, claims.down.group[1]),
    ):
        if size > 1 and width % size:
            return f"{projection}: {claim} does not end where slots of width {width} end"
        if claim.bits and width % (32 // claim.bits):
            return f"{projection}: {claim} packs columns of two slots of width {width} together"
        if any("order" in detail for detail in claim.details):
            return f"{projection}: {claim} orders columns across slots"
    return ""


def _claims(part: Part, tensors: Tensors, module: str, resolve: Resolver) -> MlpClaim:
    """Read one claim on gate and up, and one on down; Doubt where experts, or gate and up, differ."""
    numbers = {expert for experts in tensors.values() for expert in experts}
    if ALL_EXPERTS in numbers and len(numbers) > 1:
        raise Doubt(f"{part}: some projections are there for single experts, others in one tensor for all")
    if resolve is all_plain:
        # Tens of thousands of experts need not be asked for one by one.
        return MlpClaim(PLAIN, PLAIN)
    claims: dict[Projection, Claim] = {}
    for projection in sorted({p for p, _ in tensors}):
        if part == "shared":
            names = [f"{module}.{projection}"]
        elif numbers == {ALL_EXPERTS}:
            names = [f"{module}.{projection}", module]
        else:
            names = [f"{module}.{n}.{projection}" for n in sorted(numbers)]
        claim = resolve(names[0])
        for name in names[1:]:
            other = resolve(name)
            if other != claim:
                raise Doubt(f"the config says {claim} of {names[0]}, {other} of {name}")
        if len(names) == 2 and numbers == {ALL_EXPERTS} and claim != PLAIN:
            raise Doubt(f"how one tensor of all experts is stored in {claim.format} is not known")
        claims[projection] = claim
    gate = claims["gate_up_proj"] if "gate_up_proj" in claims else claims["gate_proj"]
    up = claims.get("up_proj", gate)
    if gate != up:
        raise Doubt(f"{part}: the config says {gate} of gate_proj, {up} of up_proj")
    return MlpClaim(gate, claims["down_proj"])


def _compare(tensors: Tensors, claims: MlpClaim, width: int, hidden: int, routed: bool) -> tuple[State, str]:
    if claims.gate_up.format != claims.down.format:
        return "unknown", f"no kernel is known to read {claims}"
    layout = LAYOUTS.get(claims.gate_up.format)
    if layout is None:
        return "unknown", f"how {claims.gate_up.format} is stored is not known"
    shapes = projection_shapes(width, hidden)
    unknown = ""
    for projection in sorted({p for p, _ in tensors}):
        claim = claims.down if projection == "down_proj" else claims.gate_up
        stored: dict[str, TensorHeader] = {}
        for (p, suffix), experts in tensors.items():
            if p == projection:
                expert, header = next(iter(experts.items()))
                together = routed and expert == ALL_EXPERTS
                stored[suffix] = TensorHeader(header.dtype, header.shape[1:]) if together else header
        if wrong := contradiction(layout, claim, stored, *shapes[projection]):
            return "contradicts", f"the config says {claim}, but {projection}.{wrong}"
        if extra := foreign(layout, stored):
            unknown = f"{projection}.{extra} has no place in {claim}"
    return ("unknown", unknown) if unknown else ("agrees", "")
