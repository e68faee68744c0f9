"""Projections of one MoE layer as the checkpoint has them, in float64, and how FP8 kernels round.

A format is data: its record in `quant` has the tensors that it stores and how they are read, the claim that
the checkpoint's own config makes has the granularity of its scales.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from ...errors import NoReference
from ..checkpoint.config import UNQUANTISED, ConfigFile
from ..checkpoint.families import Role
from ..checkpoint.naming import TensorNaming
from ..checkpoint.tensors import CheckpointTensors
from ..evidence.specs import ALL_EXPERTS
from ..quant.claims import PLAIN, Claim, Doubt, Resolver, all_plain
from ..quant.fp8 import BLOCK, TENSOR
from ..quant.layouts import suffixes
from ..quant.methods import LAYOUTS, READABLE, UNPACKED, resolver_for
from ..quant.scales import multiply

# The largest number of e4m3 (OCP 8-bit floating point, E4M3): kernels scale what they round to it.
E4M3_MAX = 448.0
# How kernels find a scale for activations: by largest value, the same as a power of two, and in FNUZ.
WAYS: tuple[dict[str, Any], ...] = ({}, {"power_of_two": True}, {"largest": 240.0})


def to_e4m3(values: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """Round ``values`` float64 as an FP8 kernel does: e4m3 of values / scale, saturated, times scale.

    Args:
        scale: of a shape that broadcasts to that of ``values``.
    """
    held = (values / scale).clamp(-E4M3_MAX, E4M3_MAX).float().to(torch.float8_e4m3fn)
    return held.double() * scale


Round = Callable[[torch.Tensor], torch.Tensor]
# Expert, projection and its weight -> the weight as a kernel holds it.
Weights = Callable[[int | None, str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Kernel:
    """Roundings of one kind of kernels: of what goes into gate and up, what goes into down, and weights."""

    before: Round
    between: Round
    weights: Weights


def as_it_is(rows: torch.Tensor) -> torch.Tensor:
    """Return ``rows`` of any shape and dtype: the kernel does not round them."""
    return rows


@dataclass(frozen=True)
class InputRounding:
    """Rounding of the activations [rows, in] in front of a projection to e4m3.

    Args:
        tokens, columns: how many rows and columns share a scale, their largest value / 448; 0 for all.
        scale: of a checkpoint with static activations: the one scale of the layer.
        largest: number that the largest value becomes; 240 where e4m3 is FNUZ.
        power_of_two: scales are rounded up to powers of two (UE8M0).
    """

    tokens: int
    columns: int
    scale: float | None = None
    largest: float = E4M3_MAX
    power_of_two: bool = False

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Round ``rows`` [rows, in] float64; float64."""
        if self.scale is not None:
            return to_e4m3(rows, self.scale)
        width = rows.shape[1]
        size = self.columns or width
        padded = torch.nn.functional.pad(rows, (0, -width % size)).reshape(len(rows), -1, size)
        amax = padded.abs().amax(dim=2 if self.tokens else (0, 1, 2), keepdim=True)
        scale = (amax / self.largest).clamp_min(torch.finfo(torch.float32).tiny)
        if self.power_of_two:
            scale = torch.exp2(torch.ceil(torch.log2(scale)))
        return to_e4m3(padded, scale).flatten(1)[:, :width]


class CheckpointLayer:
    """Tensors of one MoE layer, by what they are for; in float64, plain ones rounded as the engine does.

    Raises:
        NoReference: the checkpoint's safetensors files do not hold the layer, or in another format than
            those of `READABLE`.
    """

    def __init__(
        self, tensors: CheckpointTensors, naming: TensorNaming, role: Role, quant_method: str, layer: int
    ) -> None:
        self.tensors = tensors
        # Name of the gate that weighs the shared expert, None where it weighs 1.
        self.shared_gate = naming.family.shared_gate
        self.resolve = _resolver(tensors, quant_method)
        self.names: dict[tuple[int | None, str], dict[str, str]] = {}
        for name in tensors.names():
            # Most names are another layer's, and parsing takes longer than this.
            ref = naming.parse(name) if f".{layer}.mlp." in name else None
            if ref is not None and ref.layer == layer and ref.role == role:
                self.names.setdefault((ref.expert, ref.projection), {})[ref.suffix] = name
        if not self.names:
            raise NoReference("the checkpoint has no safetensors files with this layer")
        first = next(name for held in self.names.values() for name in held.values())
        self.block = first.rpartition(".mlp.")[0] + ".mlp."
        # Memory of the last expert's weights, used again: getting new memory takes longer than to fill it.
        self._held: dict[str, torch.Tensor] = {}

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Read a tensor of the block, outside its experts, rounded to ``dtype``; float64."""
        if self.block + name not in self.tensors:
            raise NoReference(f"the checkpoint has no {self.block}{name}")
        tensor = self.tensors.read(self.block + name)
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise NoReference(f"{self.block}{name} is {tensor.dtype}: only plain gates are read")
        return tensor.to(dtype).double()

    def gate_up(self, expert: int | None, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Read gate and up [I, H] of an expert, None for the shared one; float64, good until the next call.

        Args:
            dtype: that of the model: plain weights are rounded to it.
        """
        if self._together(expert):
            gate, up = self._weight(ALL_EXPERTS, "gate_up_proj", dtype, expert).chunk(2)
            return gate, up
        if (expert, "gate_up_proj") in self.names:
            gate, up = self._weight(expert, "gate_up_proj", dtype).chunk(2)
            return gate, up
        gate, up = (self._weight(expert, p, dtype) for p in ("gate_proj", "up_proj"))
        return gate, up

    def down(self, expert: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Read down [H, I] of an expert, None for the shared one; as `gate_up`."""
        together = self._together(expert)
        row = expert if together else None
        return self._weight(ALL_EXPERTS if together else expert, "down_proj", dtype, row)

    def kernels(self, ue8m0: bool = False) -> tuple[Kernel, ...]:
        """List the ways in which kernels may round; none where they do not.

        Args:
            ue8m0: kernels here may hold weights in blocks with scales rounded up to powers of two.
        """
        before, between = (self._rounding(p) for p in (("gate_proj", "up_proj"), ("down_proj",)))
        form = self._claim(None, "down_proj").format
        # Weights alone, where gate and up are quantised again and activations may stay as they are.
        alone = [Kernel(as_it_is, as_it_is, self.by_one_scale)] if form == TENSOR.name else []
        if before is None or between is None:
            return tuple(alone)
        ways = WAYS if before.scale is None else WAYS[:1]
        kernels = [Kernel(replace(before, **w), replace(between, **w), self.by_one_scale) for w in ways]
        if ue8m0 and form == BLOCK.name:
            kernels.append(replace(kernels[1], weights=self.by_powers_of_two))
        return (*alone, *kernels)

    def by_one_scale(self, expert: int | None, projection: str, weight: torch.Tensor) -> torch.Tensor:
        """Round gate and up [I, H] float64 as kernels do that have one scale for both: the larger one."""
        if projection == "down_proj" or self._claim(expert, projection).format != TENSOR.name:
            return weight
        one, other = (float(self._scale(expert, p).max()) for p in ("gate_proj", "up_proj"))
        return weight if one == other else to_e4m3(weight, max(one, other))

    def by_powers_of_two(self, expert: int | None, projection: str, weight: torch.Tensor) -> torch.Tensor:
        """Round a weight [out, in] float64 as kernels do that round scales up to powers of two (UE8M0)."""
        scale = torch.exp2(torch.ceil(torch.log2(self._scale(expert, projection))))
        group = self._claim(expert, projection).group
        return to_e4m3(weight, multiply(torch.ones_like(weight), scale, group))

    @cached_property
    def input_scale(self) -> float | None:
        """Fixed scale of hidden states, of a checkpoint with static activations."""
        before = self._rounding(("gate_proj", "up_proj"))
        return before.scale if before else None

    def _rounding(self, projections: tuple[str, ...]) -> InputRounding | None:
        names = {key: stored for key, stored in self.names.items() if key[1] in projections}
        claim = self._claim(*next(iter(names), (None, projections[0])))
        if claim.inputs is None:
            return None
        if "input_scale" not in claim.needs:
            return InputRounding(*claim.inputs)
        # Engines take the largest of all experts in a layer, the shared one's with them.
        if any("input_scale" not in stored for stored in names.values()):
            raise NoReference(f"some {projections[0]} in {self.block} has no input_scale")
        scales = [float(self.tensors.read(stored["input_scale"]).max()) for stored in names.values()]
        return InputRounding(*claim.inputs, max(scales))

    def _together(self, expert: int | None) -> bool:
        return expert is not None and (ALL_EXPERTS, "down_proj") in self.names

    def _claim(self, expert: int | None, projection: str) -> Claim:
        names = self.names.get((expert, projection))
        if names is None:
            raise NoReference(f"the checkpoint has no {projection} of expert {expert} in {self.block}")
        name = next(iter(names.values()))
        try:
            claim = self.resolve(name.rpartition(f".{projection}")[0] + f".{projection}")
        except Doubt as doubt:
            raise NoReference(str(doubt)) from None
        if claim.format not in READABLE.keys() | UNPACKED.keys():
            raise NoReference(f"{name}: the canary does not read {claim.format}")
        layout = LAYOUTS[claim.format]
        needed = ["weight"]
        if claim.format in UNPACKED:
            needed = [suffix for suffix, tensor in layout.items() if not tensor.optional]
        if not names.keys() >= {*needed} or names.keys() - suffixes(layout):
            raise NoReference(f"{name} and what is stored with it are not {claim.format}")
        return claim

    def _scale(self, expert: int | None, projection: str) -> torch.Tensor:
        """Read the weight's scales as a matrix; one row or column where they are the same for all."""
        stored = self.names[expert, projection]
        name = next((name for suffix, name in stored.items() if suffix.startswith("weight_scale")), None)
        if name is None:
            raise NoReference(f"{stored['weight']} has no scale")
        scale = self.tensors.read(name).double()
        return scale if scale.ndim == 2 else scale.reshape(-1, 1)

    def _weight(
        self, expert: int | None, projection: str, dtype: torch.dtype, row: int | None = None
    ) -> torch.Tensor:
        claim = self._claim(expert, projection)
        if (unpack := UNPACKED.get(claim.format)) is not None:
            stored = {suffix: self.tensors.read(n) for suffix, n in self.names[expert, projection].items()}
            return unpack(stored, claim, dtype)
        name = self.names[expert, projection]["weight"]
        weight = self.tensors.read(name, row)
        plain = claim.format == PLAIN.format
        if not weight.is_floating_point() or plain != (weight.element_size() > 1):
            raise NoReference(f"{name} is {weight.dtype}, which is not {claim.format}")
        held = self._held.get(projection)
        if held is None or held.shape != weight.shape:
            held = self._held[projection] = torch.empty(weight.shape, dtype=torch.float64, device="cpu")
        held.copy_(weight.to(dtype) if plain else weight)
        scale = None if plain else self._scale(expert, projection)
        return READABLE[claim.format](held, scale, claim.group)


def _resolver(tensors: CheckpointTensors, quant_method: str) -> Resolver:
    if quant_method in ("", UNQUANTISED):
        return all_plain
    try:
        return resolver_for(ConfigFile(tensors.source).quantisations())
    except Doubt as doubt:
        raise NoReference(str(doubt)) from None
