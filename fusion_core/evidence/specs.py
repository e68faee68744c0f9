"""Storage of an expert MLP: dtype and granularity of each tensor of each projection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..checkpoint.headers import TensorHeader
from ..checkpoint.naming import Projection
from ..quant.layouts import PLAIN_DTYPES

# (projection, suffix) -> expert -> header; expert -1 is the shared expert or one 3-D tensor of all.
Tensors = Mapping[tuple[Projection, str], Mapping[int, TensorHeader]]
ALL_EXPERTS = -1
# One number per element of the logical weight; packed integers are judged by policy alone.
_DENSE_DTYPES = PLAIN_DTYPES | {"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8"}


class SpecConflict(Exception):
    """Error: tensors of one MLP that should be stored alike are not; the text names them."""


@dataclass(frozen=True, order=True)
class TensorSpec:
    """One tensor of a projection: suffix, safetensors dtype, and granularity.

    ``granularity`` is "matrix" for a dense weight, "tensor", "channel" or "block 128x128" for
    scales beside one, and "2-D" (the rank) for everything else.
    """

    suffix: str
    dtype: str
    granularity: str

    def __str__(self) -> str:
        return f"{self.suffix} {self.dtype} {self.granularity}"


ProjectionSpec = tuple[TensorSpec, ...]


@dataclass(frozen=True)
class MlpSpec:
    """Storage of an expert's two fused projections, sorted by suffix."""

    gate_up: ProjectionSpec
    down: ProjectionSpec

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Return the tensors of both projections."""
        return self.gate_up + self.down

    @property
    def packed(self) -> bool:
        """Return whether a weight is not there as one number for each element."""
        return not all(
            any(tensor.suffix == "weight" and tensor.dtype in _DENSE_DTYPES for tensor in projection)
            for projection in (self.gate_up, self.down)
        )

    def difference(self, other: MlpSpec) -> str:
        """Name the first projection in which two specs differ, with both sides; "" where they are equal."""
        for name in ("gate_up", "down"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name}: routed {_words(mine)}, shared {_words(theirs)}"
        return ""


def mlp_spec(tensors: Tensors, num_experts: int | None, block: tuple[int, int] | None) -> MlpSpec:
    """Read the one way in which all experts in ``tensors`` are stored.

    Args:
        tensors: headers of the routed experts, or of the shared expert, of one layer.
        num_experts: E, or None for the shared expert.
        block: the config's ``weight_block_size``.

    Raises:
        SpecConflict: experts differ, or gate and up differ.
    """
    by_projection: dict[Projection, dict[str, TensorSpec]] = {}
    experts_of = _experts_of(tensors)
    for projection in experts_of:
        if ALL_EXPERTS in experts_of[projection] and len(experts_of[projection]) > 1:
            raise SpecConflict(f"{projection} is there for single experts and in one tensor for all")
        weight = _one(tensors, projection, "weight")
        specs = by_projection.setdefault(projection, {})
        for suffix in sorted(s for p, s in tensors if p == projection):
            if len(tensors[projection, suffix]) != len(experts_of[projection]):
                raise SpecConflict(f"{projection}.{suffix} is there for some experts only")
            header = _one(tensors, projection, suffix)
            assert header is not None
            # Bare 3-D tensors call their scales "<projection>_scale": the weight's name is left out.
            name = f"weight_{suffix}" if suffix.startswith("scale") and weight is not None else suffix
            experts = num_experts if ALL_EXPERTS in tensors[projection, suffix] else None
            specs[name] = TensorSpec(name, header.dtype, _granularity(name, header, weight, experts, block))
    # A layer stores gate and up either apart or together, and every expert the same way.
    names = set(by_projection)
    if names not in ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"}):
        raise SpecConflict(f"has the projections {', '.join(sorted(names))}")
    gate = by_projection.get("gate_up_proj") or by_projection["gate_proj"]
    up = by_projection.get("up_proj", gate)
    if gate != up:
        raise SpecConflict(f"gate_proj is {_words(_sorted(gate))}, up_proj {_words(_sorted(up))}")
    return MlpSpec(_sorted(gate), _sorted(by_projection["down_proj"]))


def projection_shapes(width: int, hidden: int) -> dict[Projection, tuple[int, int]]:
    """Return the shape [out, in] of each projection of an MLP of ``width``."""
    return {
        "gate_proj": (width, hidden),
        "up_proj": (width, hidden),
        "gate_up_proj": (2 * width, hidden),
        "down_proj": (hidden, width),
    }


def size_conflict(tensors: Tensors, num_experts: int | None, width: int, hidden: int) -> str | None:
    """Say what in ``tensors`` has another size than config.json says, or None.

    Expected: the `projection_shapes`, with a leading [num_experts] where one tensor holds all experts; and
    every expert from 0 to num_experts - 1.
    """
    shapes = projection_shapes(width, hidden)
    for projection, numbers in sorted(_experts_of(tensors).items()):
        if num_experts is None or ALL_EXPERTS in numbers:
            continue
        if len(numbers) != num_experts or max(numbers) >= num_experts:
            return f"{projection}: {len(numbers)} experts up to {max(numbers)}, config.json has {num_experts}"
    for (projection, suffix), experts in sorted(tensors.items()):
        if suffix != "weight":
            continue
        label = f"{projection}.{suffix}"
        for together, header in {(e == ALL_EXPERTS, h) for e, h in experts.items()}:
            leading = (num_experts,) if together and num_experts is not None else ()
            expected = leading + shapes[projection]
            if header.dtype in _DENSE_DTYPES and header.shape != expected:
                return f"{label} has shape {list(header.shape)}, config.json makes it {list(expected)}"
    return None


def sizes_differ(routed: Tensors, shared: Tensors, slots: int | None) -> str:
    """Say what of packed weights has another size in the shared expert than in ``slots`` routed ones, or "".

    Weights that are one number for each element, and what is stored beside them, are compared by
    granularity. Of others the sizes alone show how many numbers an integer holds, or share a scale.
    """
    for place, experts in sorted(routed.items()):
        projection, suffix = place
        weight = routed.get((projection, "weight"))
        dense = weight is not None and next(iter(weight.values())).dtype in _DENSE_DTYPES
        if slots is None or dense or place not in shared:
            continue
        number, header = next(iter(experts.items()))
        mine = header.shape[1:] if number == ALL_EXPERTS else header.shape
        other = next(iter(shared[place].values())).shape
        if not _is_so_many(mine, other, slots):
            return f"{projection}.{suffix} is {list(mine)} in routed experts, {list(other)} in the shared one"
    return ""


def _is_so_many(one: tuple[int, ...], all_of_them: tuple[int, ...], slots: int) -> bool:
    """Tell if at most one size grows ``slots`` times; the last group of each slot may be a partial one."""
    if len(one) != len(all_of_them):
        return False
    grown = [(n, total) for n, total in zip(one, all_of_them, strict=True) if n != total]
    return len(grown) <= 1 and all(slots * (n - 1) < total <= slots * n for n, total in grown)


def _experts_of(tensors: Tensors) -> dict[Projection, set[int]]:
    numbers: dict[Projection, set[int]] = {}
    for (projection, _), experts in tensors.items():
        numbers.setdefault(projection, set()).update(experts)
    return numbers


def _one(tensors: Tensors, projection: Projection, suffix: str) -> TensorHeader | None:
    """Return the header that all experts share."""
    experts = tensors.get((projection, suffix))
    if not experts:
        return None
    first_expert, first = next(iter(experts.items()))
    if len(set(experts.values())) > 1:
        expert, other = next((e, h) for e, h in experts.items() if h != first)
        raise SpecConflict(
            f"{projection}.{suffix} is {first.dtype} {list(first.shape)} in expert {first_expert}, "
            f"{other.dtype} {list(other.shape)} in expert {expert}"
        )
    return first


def _granularity(
    suffix: str,
    header: TensorHeader,
    weight: TensorHeader | None,
    num_experts: int | None,
    block: tuple[int, int] | None,
) -> str:
    """Name the granularity of one expert's tensor; ``num_experts`` is E if ``header`` holds all experts."""
    shape = header.shape[1:] if num_experts is not None else header.shape
    if suffix == "weight":
        return "matrix" if len(shape) == 2 else f"{len(shape)}-D"
    if weight is None or len(weight.shape) < 2:
        return f"{len(shape)}-D"
    out, inner = weight.shape[-2:]
    # One number is stored as [] or [1], a column as [out, 1] or [out]: loaders do not take one for the other.
    if all(n == 1 for n in shape):
        return f"tensor {len(shape)}-D" if shape else "tensor"
    if shape in ((out,), (out, 1)):
        return "channel" if len(shape) == 2 else "channel 1-D"
    if len(shape) == 2 and all((*shape, out, inner)):
        # The config names the block; without it the sizes tell, up to a partial last block.
        rows, columns = block or (-(-out // shape[0]), -(-inner // shape[1]))
        if shape == (-(-out // rows), -(-inner // columns)):
            return f"block {rows}x{columns}"
    return "x".join(map(str, shape)) or "0-D"


def _sorted(specs: Mapping[str, TensorSpec]) -> ProjectionSpec:
    return tuple(sorted(specs.values()))


def _words(spec: ProjectionSpec) -> str:
    return " + ".join(map(str, spec)) or "nothing"
