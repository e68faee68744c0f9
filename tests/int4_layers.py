"""4-bit experts of a layer for tests of both engines: as a checkpoint has them, and as numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from checkpoints import int4
from checkpoints.int4 import KINDS, Numbers, Tensors

from fse_patch.adapters.expert_reading import Unreadable
from fse_patch.fusion_core.kernels.expert_weights import ExpertWeights
from fse_patch.fusion_core.kernels.pass_reference import dense

EXPERTS, HIDDEN, WIDTH = 3, 256, 256
DTYPE = torch.float16
# What both engines pack for Marlin: kinds of checkpoints, and groups.
PACKED_FOR_MARLIN = [
    ("gptq", 128),
    ("gptq", 32),
    ("auto_round", 128),
    ("awq", 128),
    ("packed", 32),
    ("packed", 128),
]
# Names of what is packed along the rows of a matrix: there halves of w13 follow each other in columns.
SHIFTS = torch.arange(0, 32, 4, dtype=torch.int32)


@dataclass
class Drawn:
    """Experts of one kind of checkpoint.

    Args:
        loaded: what an engine has loaded, "w13_qweight" and so on: [E, ...], as the checkpoint has it.
        matrices: w13 and w2 of each expert as numbers.
    """

    kind: str
    group: int
    loaded: Tensors
    matrices: list[tuple[torch.Tensor, torch.Tensor]]


def drawn(kind: str, group: int = 0, width: int = WIDTH) -> Drawn:
    """Draw experts and pack them with the project's packer, which is held against public ones elsewhere."""
    made, generator = KINDS[kind], torch.Generator().manual_seed(3)
    group = group or made.group
    rows = 0 if kind == "packed" else 1  # the dimension of rows in a packed matrix
    loaded: dict[str, list[torch.Tensor]] = {}
    matrices = []
    for _ in range(EXPERTS):
        held: list[Numbers] = []
        for shape in ((width, HIDDEN), (width, HIDDEN), (HIDDEN, width)):
            weight = torch.randn(shape, generator=generator) * 0.05
            held.append(int4.rounded(weight, group, made.zeros, DTYPE))
        parts = [made.pack(numbers) for numbers in held]
        for name in parts[0]:
            if name in ("g_idx", "weight_shape"):
                continue
            loaded.setdefault(f"w13_{name}", []).append(torch.cat([parts[0][name], parts[1][name]], rows))
            loaded.setdefault(f"w2_{name}", []).append(parts[2][name])
        gate, up, down = (numbers.dense() for numbers in held)
        matrices.append((torch.cat([gate, up]), down))
    return Drawn(kind, group, {name: torch.stack(all_) for name, all_ in loaded.items()}, matrices)


def fill(layer: torch.nn.Module, held: Drawn, transposed: bool = False) -> None:
    """Load into parameters that the engine's method has made; ``transposed``: they have columns first."""
    for name, tensor in held.loaded.items():
        parameter = getattr(layer, name, None)
        if parameter is not None:
            parameter.data.copy_(tensor.transpose(1, 2) if transposed else tensor)


def off(weights: ExpertWeights, held: Drawn) -> float:
    """How far what is read is off what was drawn, at most."""
    worst = 0.0
    for expert, expected in enumerate(held.matrices):
        for mine, theirs in zip(dense(weights, torch.float32, expert), expected, strict=True):
            worst = max(worst, float((mine[: len(theirs), : theirs.shape[1]] - theirs).abs().max()))
    return worst


def gptq_numbers(packed: torch.Tensor) -> torch.Tensor:
    """Unpack [K / 8, N] as GPTQ has it: [K, N]."""
    return (packed[:, None, :] >> SHIFTS[None, :, None] & 15).flatten(0, 1)


def awq_numbers(packed: torch.Tensor) -> torch.Tensor:
    """Unpack [K, N / 8] as AWQ has it: [K, N]."""
    columns = packed[..., None] >> SHIFTS & 15
    out = torch.empty_like(columns)
    out[..., int4.AWQ_ORDER] = columns
    return out.flatten(1)


def harmed(weights: ExpertWeights, fault: str) -> ExpertWeights:
    """Read the same memory with a fault."""
    held = weights.int4
    assert held is not None
    if fault == "nibbles swapped":

        def swapped(words: Any) -> Any:
            size = words.view(torch.uint8)
            return (size << 4 | size >> 4).view(words.dtype)

        return replace(weights, w13=swapped(weights.w13.contiguous()), w2=swapped(weights.w2.contiguous()))
    if fault == "scales as they are":
        many = [i + 8 * j for i in range(8) for j in range(8)]

        def ordered(scale: torch.Tensor) -> torch.Tensor:
            return scale.unflatten(2, (-1, 64))[..., many].flatten(2).contiguous()

        return replace(weights, int4=replace(held, w13=ordered(held.w13), w2=ordered(held.w2)))
    assert fault == "zero points off by one"
    if held.w13_zeros is None or held.w2_zeros is None:
        points = [torch.full(shape, 0x77777777, dtype=torch.int32) for shape in _shapes(weights)]
    else:
        points = [held.w13_zeros ^ 0x11111111, held.w2_zeros ^ 0x11111111]
    return replace(weights, int4=replace(held, w13_zeros=points[0], w2_zeros=points[1]))


def _shapes(weights: ExpertWeights) -> list[tuple[int, ...]]:
    held = weights.int4
    assert held is not None
    return [(*scale.shape[:2], scale.shape[2] // 8) for scale in (held.w13, held.w2)]


FAULTS = ("nibbles swapped", "scales as they are", "zero points off by one")


def check_read(weights: ExpertWeights | None, held: Drawn, faults: Iterable[str] = ()) -> ExpertWeights:
    """Hold what was read against what was drawn; each fault in reading it must show."""
    assert weights is not None
    assert off(weights, held) == 0.0
    for fault in faults:
        assert off(harmed(weights, fault), held) > 1e-4, fault
    return weights


def check_plain_bytes(
    read: Callable[[Any], ExpertWeights | None], layer: torch.nn.Module, held: Drawn, zeros: bool
) -> None:
    """Fill a layer of MoeWNA16 as its loader does, and read it; the control is a zero point less 1."""
    for part in ("w13", "w2"):
        packed = held.loaded[f"{part}_weight_packed"].contiguous().view(torch.uint8)
        getattr(layer, f"{part}_qweight").data.copy_(packed)
        getattr(layer, f"{part}_scales").data.copy_(held.loaded[f"{part}_weight_scale"])
        if zeros:
            getattr(layer, f"{part}_qzeros").data.fill_(0x88)
    check_read(read(layer), held)
    if zeros:
        layer.w2_qzeros.data.fill_(0x87)
        weights = read(layer)
        assert weights is not None
        assert off(weights, held) > 1e-4


def refusal_of(read: Callable[[Any], ExpertWeights | None], layer: torch.nn.Module) -> tuple[str, str]:
    """Return code and text of the refusal to read a layer."""
    with pytest.raises(Unreadable) as seen:
        read(layer)
    return seen.value.code, str(seen.value)
