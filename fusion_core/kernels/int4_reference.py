"""4-bit experts read in torch, by the formulas of marlin_tile.py and packed_bytes.py: for proofs."""

from __future__ import annotations

import torch

from .int4 import Int4


def dense(int4: Int4, name: str, weight: torch.Tensor, expert: int, dtype: torch.dtype) -> torch.Tensor:
    """Return ``w13`` or ``w2`` of one expert as numbers: [N, K].

    Args:
        weight: of all experts; ``name``: which of both it is.
        dtype: of the result; float32 or wider.
    """
    one = slice(expert, expert + 1)
    _, columns = int4.shape(weight)
    scale: torch.Tensor = getattr(int4, name)[one]
    zero: torch.Tensor | None = getattr(int4, f"{name}_zeros")
    if int4.tiles:
        held = tile_numbers(weight[one])
        scale = tile_scales(scale, int4.single(columns))
        zero = None if zero is None else tile_zeros(zero[one], int4.humming)
    else:
        held = byte_numbers(weight[one])
        zero = None if zero is None else byte_zeros(zero[one])
    size = columns // scale.shape[2]

    def spread(of_groups: torch.Tensor) -> torch.Tensor:
        return of_groups[0].to(dtype).repeat_interleave(size, 1)

    return (held[0].to(dtype) - (8 if zero is None else spread(zero))) * spread(scale)


def tile_numbers(weight: torch.Tensor) -> torch.Tensor:
    """Unpack Marlin's tiles int32 [E, K / 16, 2 * N]: numbers from 0 to 15, [E, N, K] uint8."""
    _, deep, wide = weight.shape
    n = torch.arange(wide // 2, device=weight.device)[:, None]
    k = torch.arange(deep * 16, device=weight.device)[None, :]
    word = n // 64 * 128 + (n % 8 * 4 + k % 8 // 2) * 4 + n % 64 // 16
    nibble = k % 2 * 4 + n % 16 // 8 * 2 + k % 16 // 8
    words = weight[:, (k // 16).expand_as(word), word]
    # A shift of a negative word brings ones in from above, which the mask takes off.
    return (words >> (nibble * 4).int() & 15).to(torch.uint8)


def tile_scales(scale: torch.Tensor, single: bool) -> torch.Tensor:
    """Bring scales [E, groups, N] in order: [E, N, groups]; ``single``: from the order of one group."""
    n = torch.arange(scale.shape[2], device=scale.device)
    c = n % 64
    at = n // 64 * 64 + c % 8 * 8 + c // 8
    if single:
        c = n % 32
        at = n // 32 * 32 + c % 8 // 2 * 8 + c // 8 * 2 + c % 2
    return scale[:, :, at].transpose(1, 2)


def tile_zeros(zero: torch.Tensor, humming: bool = False) -> torch.Tensor:
    """Unpack zero points int32 [E, groups, N / 8]: [E, N, groups] uint8; ``humming``: packed by it."""
    n = torch.arange(zero.shape[2] * 8, device=zero.device)
    m = n % 64 // 8
    nibble = m if humming else m % 2 * 4 + m // 2
    words = zero[:, :, n // 64 * 8 + n % 8]
    return (words >> (nibble * 4).int() & 15).to(torch.uint8).transpose(1, 2)


def byte_numbers(weight: torch.Tensor) -> torch.Tensor:
    """Unpack uint8 [E, N, K / 2]: numbers from 0 to 15, [E, N, K] uint8."""
    return torch.stack([weight & 15, weight >> 4], -1).flatten(2)


def byte_zeros(zero: torch.Tensor) -> torch.Tensor:
    """Unpack zero points uint8 [E, N / 2, groups]: [E, N, groups] uint8."""
    return torch.stack([zero & 15, zero >> 4], 2).flatten(1, 2)
