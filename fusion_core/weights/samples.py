"""Samples of the shared experts as the checkpoint streams them, looked for in the slots after the load.

Bit by bit, and reckoned from the checkpoint's rows and columns: nothing of the remap is used. A part in
the wrong slot, shard, row, column or process, transposed or changed on its way shows without a forward. So
it is with the scales of FP8 weights. What an engine holds in another layout or dtype is not compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from ...errors import AuditError
from ..checkpoint.families import Role
from ..checkpoint.naming import ExpertTensor, Projection, TensorNaming
from ..decision.layout import ExpertLayout
from .remap import Named

# Values of each projection that go to each slot.
VALUES = 64
# Scales beside a weight; of these every value is looked for.
SCALES = frozenset({"weight_scale_inv", "weight_scale", "input_scale"})


@dataclass(frozen=True)
class _Sample:
    """Values of one tensor, seen as a matrix of [intermediate width, hidden size] or of their blocks.

    Args:
        inner, outer: where along the two sizes.
        extent: how many there are of both.
    """

    projection: Projection
    suffix: str
    inner: torch.Tensor
    outer: torch.Tensor
    extent: tuple[int, int]
    values: torch.Tensor

    @property
    def parameter(self) -> str:
        """Return the name of the fused parameter, e.g. ``w13_weight``."""
        return f"{'w2' if self.projection == 'down_proj' else 'w13'}_{self.suffix}"


@dataclass
class Comparison:
    """Result of comparing one layer.

    Args:
        compared: values that are as in the checkpoint.
        not_compared: parameters that the engine holds in another layout, or dtype, than the checkpoint.
    """

    compared: int = 0
    not_compared: set[str] = field(default_factory=set)


class SlotSample:
    """Samples of one load.

    Args:
        layout, role: of the layers whose shared experts are sampled.
        naming: reads the checkpoint's tensor names.
        layers: the fused layers that this process holds.
    """

    def __init__(self, layout: ExpertLayout, role: Role, naming: TensorNaming, layers: Iterable[int]) -> None:
        self.layout = layout
        self.role = role
        self.naming = naming
        self._below = f".{naming.family.shared_module}."
        self.layers = frozenset(layers)
        self._samples: dict[int, list[_Sample]] = {}
        self._other: dict[int, set[str]] = {}

    def tap(self, stream: Iterable[Named]) -> Iterator[Named]:
        """Pass the stream on as it is; weights of shared experts and their scales are sampled on the way."""
        for name, tensor in stream:
            # Most names are other tensors', and the remap parses each of them anyway.
            ref = self.naming.parse(name) if self._below in name else None
            if ref is not None and ref.is_shared and ref.role == self.role and ref.layer in self.layers:
                self._note(ref, tensor)
            yield name, tensor

    def _note(self, ref: ExpertTensor, tensor: torch.Tensor) -> None:
        if ref.projection == "gate_up_proj" and tensor.ndim == 2:
            half = len(tensor) // 2
            self._note(replace(ref, projection="gate_proj"), tensor[:half])
            self._note(replace(ref, projection="up_proj"), tensor[half:])
            return
        down = ref.projection == "down_proj"
        width, hidden = self.layout.shared_intermediate_size, self.layout.hidden_size
        matrix = _matrix(ref.suffix, tensor, hidden if down else width)
        if matrix is None or (
            ref.suffix == "weight" and list(matrix.shape) != ([hidden, width] if down else [width, hidden])
        ):
            # Packed integers, and sizes that do not fit: those are the remap's to refuse.
            self._other.setdefault(ref.layer, set()).add(f"{'w2' if down else 'w13'}_{ref.suffix}")
            return
        extent = (matrix.shape[1], matrix.shape[0]) if down else (matrix.shape[0], matrix.shape[1])
        if ref.suffix == "weight":
            count = VALUES * self.layout.num_shared_slots
            draw = torch.Generator("cpu").manual_seed(ref.layer)
            # Evenly along the width, so that every slot and every part of it for a process gets its share.
            inner = (torch.arange(count, device="cpu") * width) // count
            outer = torch.randint(hidden, (count,), generator=draw, device="cpu")
        else:
            every = torch.arange(extent[0] * extent[1], device="cpu")
            inner, outer = every // extent[1], every % extent[1]
        rows, columns = (outer, inner) if down else (inner, outer)
        values = _at(matrix, rows, columns)
        sample = _Sample(ref.projection, ref.suffix, inner, outer, extent, values)
        self._samples.setdefault(ref.layer, []).append(sample)

    def compare(
        self, layer: int, parameters: Mapping[str, torch.Tensor], rank: int, parts: int = 0, rows: int = 0
    ) -> Comparison:
        """Look for a layer's samples in its slots.

        Args:
            parameters: of the fused experts, by name ("w13_weight", "w2_weight_scale", ...), as they were
                just loaded.
            rank: which part of the intermediate width this process holds, where it holds a part.
            parts: of how many parts; 0: as the parameters look. Wider ones end in padding.
            rows: of the parameters, S slots among them; 0: one for each of E + S experts.

        Raises:
            AuditError: a value is not what the checkpoint has.
        """
        comparison = Comparison(not_compared=set(self._other.get(layer, ())))
        width, total = self.layout.moe_intermediate_size, rows or self.layout.num_experts
        first = total - self.layout.num_shared_slots
        slots = {n: p[first:] for n, p in parameters.items() if p.ndim and p.shape[0] == total}
        if parts and not width % parts:
            slots |= _without_padding(slots, width // parts)
        w2 = slots.get("w2_weight")
        held = w2.shape[2] if w2 is not None and w2.ndim == 3 else 0
        parts = width // held if held and not width % held else 0
        samples = self._samples.get(layer, [])
        places = [(sample, self._place(layer, sample, slots, parts)) for sample in samples]
        # A weight in 8 bits is what the checkpoint has as long as its scales are.
        moved = {s.parameter for s, place in places if place is None and s.suffix.startswith("weight_scale")}
        for sample, place in places:
            scaled = sample.suffix == "weight" and sample.values.element_size() == 1
            if place is None or (scaled and any(m.startswith(f"{sample.parameter}_") for m in moved)):
                comparison.not_compared.add(sample.parameter)
            else:
                comparison.compared += self._look(layer, sample, place, parts, rank % parts)
        return comparison

    def _place(
        self, layer: int, sample: _Sample, slots: Mapping[str, torch.Tensor], parts: int
    ) -> torch.Tensor | None:
        """View the parameter as [S, width of w1 and w3 or of w2, hidden size]; None where it is not that."""
        parameter = slots.get(sample.parameter)
        if parameter is None or parameter.is_meta or not parts or not parameter.ndim:
            return None
        small = {parameter.element_size(), sample.values.element_size()}
        if not parameter.is_floating_point() or (1 in small and parameter.dtype != sample.values.dtype):
            return None
        cuts = self.layout.num_shared_slots * parts
        mine, outer = sample.extent
        if mine > 1:
            # Blocks must end where slots and parts do.
            if mine % cuts or (cuts > 1 and self.layout.shared_intermediate_size % mine):
                return None
            mine //= cuts
        down = sample.projection == "down_proj"
        if sample.suffix == "input_scale" and not down and parameter.numel() == self.layout.num_shared_slots:
            # One number for gate and up, which is the checkpoint's where it has one for both.
            return parameter.reshape(-1, 1, 1).expand(-1, 2, 1) if self._one_input_scale(layer) else None
        shape = [self.layout.num_shared_slots, *((outer, mine) if down else (2 * mine, outer))]
        if parameter.shape[0] != shape[0] or parameter.numel() != shape[0] * shape[1] * shape[2]:
            return None
        if parameter.ndim == 3 and list(parameter.shape) != shape:
            return None
        whole = parameter.reshape(shape)
        return whole.transpose(1, 2) if down else whole

    def _one_input_scale(self, layer: int) -> bool:
        scales = [s.values for s in self._samples[layer] if s.parameter == "w13_input_scale"]
        return all(torch.equal(scale, scales[0]) for scale in scales)

    def _look(self, layer: int, sample: _Sample, place: torch.Tensor, parts: int, rank: int) -> int:
        slots = self.layout.num_shared_slots
        shards = 1 if sample.projection == "down_proj" else 2
        mine = place.shape[1] // shards
        first = mine if sample.projection == "up_proj" else 0
        compared = 0
        for slot in range(slots):
            # What has no extent along the width is the same for every slot and every part.
            start = (slot * parts + rank) * mine if sample.extent[0] > 1 else 0
            here = (sample.inner >= start) & (sample.inner < start + mine)
            inner, outer = sample.inner[here] - start + first, sample.outer[here]
            values = _at(place[slot], inner, outer)
            differing = (_bits(values) != _bits(_picked(sample.values, here).to(values.dtype))).any(dim=1)
            if bool(differing.any()):
                raise AuditError(
                    f"{self.role} model: layer {layer} slot {self.layout.num_routed + slot}: "
                    f"{int(differing.sum())} of {len(values)} sampled values of {sample.projection}"
                    f"{'' if sample.suffix == 'weight' else '.' + sample.suffix} are not the checkpoint's; "
                    "the model is not served"
                )
            compared += len(values)
        return compared


def _without_padding(slots: Mapping[str, torch.Tensor], held: int) -> dict[str, torch.Tensor]:
    """Cut from weights of the slots what kernels want beside ``held`` rows or columns of each projection."""
    w13, w2 = slots.get("w13_weight"), slots.get("w2_weight")
    if w13 is None or w2 is None or w2.ndim != 3 or w2.shape[2] <= held or w13.shape[1] != 2 * w2.shape[2]:
        return {}
    return {
        "w13_weight": w13.reshape(len(w13), 2, -1, w13.shape[2])[:, :, :held].flatten(1, 2),
        "w2_weight": w2[:, :, :held],
    }


def _at(matrix: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Pick values of a matrix into the host's memory; those in 8 bits are picked as bytes."""
    small = matrix.element_size() == 1
    held = matrix.view(torch.uint8) if small else matrix
    values = held[rows.to(matrix.device), columns.to(matrix.device)].to("cpu")
    return values.view(matrix.dtype) if small else values


def _picked(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if values.element_size() > 1:
        return values[mask]
    return values.view(torch.uint8)[mask].view(values.dtype)


def _bits(values: torch.Tensor) -> torch.Tensor:
    """Return the bytes of each value, [N, size]: 8-bit formats do not compare."""
    return values.contiguous().view(torch.uint8).reshape(len(values), -1)


def _matrix(suffix: str, tensor: torch.Tensor, out: int) -> torch.Tensor | None:
    """Return a weight as it is, its scales as a matrix; None for what is neither."""
    if not tensor.is_floating_point() or tensor.ndim > 2:
        return None
    if suffix == "weight":
        return tensor if tensor.ndim == 2 else None
    if suffix not in SCALES:
        return None
    if tensor.ndim == 2:
        return tensor
    return tensor.reshape(-1, 1) if tensor.numel() in (1, out) else None
