"""4-bit weights for tests, packed as engines leave them, by the tables in which the layouts are published."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fse_patch.fusion_core.kernels import int4_reference
from fse_patch.fusion_core.kernels.expert_weights import ExpertWeights
from fse_patch.fusion_core.kernels.int4 import Int4, Layout

from .test_kernels import DEVICE

# Marlin's orders of 64 rows of scales with several groups, and of 32 with one; and of 8 numbers in a word.
MANY = [i + 8 * j for i in range(8) for j in range(8)]
ONE = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
IN_A_WORD = [0, 2, 4, 6, 1, 3, 5, 7]


def words(nibbles: torch.Tensor) -> torch.Tensor:
    """Pack 8 numbers a word, the first one lowest: [..., n] to int32 [..., n / 8]."""
    packed = sum(nibbles[..., at::8].long() << 4 * at for at in range(8))
    assert isinstance(packed, torch.Tensor)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def marlin_weights(numbers: torch.Tensor) -> torch.Tensor:
    """Pack [E, N, K] as the threads of a warp hold it: each has four words, for 16 rows of a tile each."""
    experts, n, k = numbers.shape
    # Tiles, and in each 64 rows and 16 columns.
    tiles = numbers.view(experts, n // 64, 64, k // 16, 16).permute(0, 3, 1, 2, 4)
    held = []
    for thread in range(32):
        for word in range(4):
            for column in (0, 1):
                for row in (0, 8):
                    for far in (0, 8):
                        at = 2 * (thread % 4) + column + far
                        held.append(tiles[..., 16 * word + row + thread // 4, at])
    return words(torch.stack(held, -1)).flatten(2)


def marlin_scales(scales: torch.Tensor, single: bool) -> torch.Tensor:
    """Order scales [E, N, groups]: [E, groups, N]; ``single``: as those of one group."""
    order = ONE if single else MANY
    scales = scales.transpose(1, 2)
    return scales.unflatten(2, (-1, len(order)))[..., order].flatten(2).contiguous()


def marlin_zeros(zeros: torch.Tensor, humming: bool) -> torch.Tensor:
    """Order and pack zero points [E, N, groups]: int32 [E, groups, N / 8]."""
    ordered = zeros.transpose(1, 2).unflatten(2, (-1, 64))[..., MANY].flatten(2)
    return words(ordered if humming else ordered.unflatten(2, (-1, 8))[..., IN_A_WORD].flatten(2))


def byte_weights(numbers: torch.Tensor) -> torch.Tensor:
    """Pack [E, N, K]: uint8 [E, N, K / 2]."""
    return numbers[..., ::2] | numbers[..., 1::2] << 4


def byte_zeros(zeros: torch.Tensor) -> torch.Tensor:
    """Pack zero points [E, N, groups]: uint8 [E, N / 2, groups]."""
    return zeros[:, ::2] | zeros[:, 1::2] << 4


@dataclass
class Matrix:
    """Numbers of 4 bits [E, N, K], and scales and zero points [E, N, groups]; they can be harmed."""

    numbers: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None

    def exactly(self) -> torch.Tensor:
        """Return the weights in float64."""
        size = self.numbers.shape[2] // self.scales.shape[2]
        zeros = 8 if self.zeros is None else self.zeros.double().repeat_interleave(size, 2)
        return (self.numbers.double() - zeros) * self.scales.double().repeat_interleave(size, 2)


def drawn(shape: tuple[int, int, int], group: int, zeros: bool, dtype: torch.dtype, seed: int) -> Matrix:
    """Draw a matrix of weights of about 0.05, all different from group to group."""
    generator = torch.Generator().manual_seed(seed)
    experts, n, k = shape
    groups = -(-k // group) if group else 1
    numbers = torch.randint(16, shape, generator=generator, dtype=torch.uint8)
    scales = (torch.rand(experts, n, groups, generator=generator) + 0.5) * 0.01
    points = torch.randint(16, (experts, n, groups), generator=generator, dtype=torch.uint8)
    return Matrix(numbers.to(DEVICE), scales.to(dtype).to(DEVICE), points.to(DEVICE) if zeros else None)


def packed(w13: Matrix, w2: Matrix, layout: Layout, group: int, humming: bool = False) -> ExpertWeights:
    """Return both matrices as an engine leaves them."""
    tiles = layout is Layout.MARLIN_TILE

    def zeros(matrix: Matrix) -> torch.Tensor | None:
        if matrix.zeros is None:
            return None
        return marlin_zeros(matrix.zeros, humming) if tiles else byte_zeros(matrix.zeros)

    weights = [marlin_weights(each.numbers) if tiles else byte_weights(each.numbers) for each in (w13, w2)]
    # Humming goes by what was declared, Marlin by what there is.
    single = [group == 0 if humming else each.scales.shape[2] == 1 for each in (w13, w2)]
    scales = [
        marlin_scales(each.scales, alone) if tiles else each.scales
        for each, alone in zip((w13, w2), single, strict=True)
    ]
    beside = Int4(layout, *scales, group, zeros(w13), zeros(w2), humming)
    return ExpertWeights(*weights, int4=beside)


def read(weights: ExpertWeights, name: str) -> Matrix:
    """Unpack a matrix by the readers' own formulas."""
    int4 = weights.int4
    assert int4 is not None
    weight: torch.Tensor = getattr(weights, name)
    scales: torch.Tensor = getattr(int4, name)
    zeros: torch.Tensor | None = getattr(int4, f"{name}_zeros")
    if int4.tiles:
        points = None if zeros is None else int4_reference.tile_zeros(zeros, int4.humming)
        single = int4.single(int4.shape(weight)[1])
        return Matrix(int4_reference.tile_numbers(weight), int4_reference.tile_scales(scales, single), points)
    return Matrix(
        int4_reference.byte_numbers(weight),
        scales,
        None if zeros is None else int4_reference.byte_zeros(zeros),
    )
