"""4-bit routed experts beside a shared expert in its own format, against float64, in every layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fse_patch.fusion_core.kernels.expert_weights import ExpertWeights, slots_of
from fse_patch.fusion_core.kernels.experts_once import experts_once
from fse_patch.fusion_core.kernels.once_tiles import tiles_of

from .int4 import Matrix
from .test_experts_once import routed
from .test_int4_readers import HELD, made
from .test_kernels import DEVICE, draw, off
from .test_shared_apart import expected, weights_in

# Tokens, H, I, E, k, width of the shared expert.
SHAPES = {"small": (3, 256, 128, 4, 2, 128), "two slots": (2, 128, 64, 5, 2, 128)}
if DEVICE == "cuda":
    SHAPES |= {
        "35b": (1, 2048, 512, 24, 8, 512),
        "35b, 8": (8, 2048, 512, 24, 8, 512),
        "35b, 16": (16, 2048, 512, 24, 8, 512),
        "397b tp4": (8, 4096, 256, 24, 10, 256),
    }
CASES = [(how, "plain", torch.float16, "small") for how in HELD]
CASES += [("marlin g128", shared, torch.bfloat16, "small") for shared in ("plain", "block", "channel")]
CASES += [
    ("marlin g32", "plain", torch.bfloat16, "two slots"),
    ("bytes g32", "block", torch.bfloat16, "two slots"),
]
if DEVICE == "cuda":
    CASES += [(how, "plain", torch.bfloat16, name) for how in HELD for name in list(SHAPES)[2:]]
    CASES += [("marlin g128", "block", torch.bfloat16, name) for name in list(SHAPES)[2:]]
Run = tuple[torch.Tensor, torch.Tensor]


def limit(dtype: torch.dtype) -> float:
    """The largest error; the interpreter cuts bfloat16 off instead of rounding it."""
    return 0.001 if dtype == torch.float16 else 0.005 if DEVICE == "cuda" else 0.012


def shared_of(kind: str, hidden: int, width: int, dtype: torch.dtype) -> tuple[ExpertWeights, ExpertWeights]:
    """The shared expert in a format, and exactly."""
    if kind != "plain":
        return weights_in(kind, 1, hidden, width, 7)
    w13 = draw(1, 2 * width, hidden, seed=7, dtype=dtype, scale=0.05)
    w2 = draw(1, hidden, width, seed=8, dtype=dtype, scale=0.05)
    return ExpertWeights(w13, w2), ExpertWeights(w13.double(), w2.double())


def run(
    how: str,
    kind: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    harm: Callable[[Matrix, Matrix], None] | None = None,
    own_tiles: bool = False,
) -> Run:
    """What the kernels make of harmed weights, and what is right for the sound ones, in float64."""
    tokens, hidden, width, count, top_k, shared_width = shape
    weights, _, _ = made(how, count, hidden, width, dtype, harm)
    _, w13, w2 = made(how, count, hidden, width, dtype)
    shared, shared_exactly = shared_of(kind, hidden, shared_width, dtype)
    states = draw(tokens, hidden, seed=4, dtype=dtype)
    slots = slots_of(shared, width)
    ids = routed("even", tokens, count, top_k, slots)
    ids[0, :top_k] = torch.arange(top_k)  # among them experts that can be harmed
    topk_weights = draw(tokens, top_k + slots, seed=9).sigmoid()
    topk_weights[:, top_k:] = topk_weights[:, top_k : top_k + 1]
    tiles = tiles_of(weights, shared, tokens)
    if DEVICE != "cuda" and not own_tiles:
        # The interpreter takes its time for each tile, whatever its size.
        tiles = replace(tiles[0], rows=64), replace(tiles[1], rows=64)
    got = experts_once(states, weights, topk_weights, ids, shared, tiles)
    exactly = ExpertWeights(w13.exactly(), w2.exactly())
    return got, expected(states, exactly, shared_exactly, topk_weights, ids)


@pytest.mark.parametrize(("how", "kind", "dtype", "shape"), CASES, ids=str)
def test_int4_beside_the_shared_expert(how: str, kind: str, dtype: torch.dtype, shape: str) -> None:
    got, right = run(how, kind, dtype, SHAPES[shape], own_tiles=dtype == torch.bfloat16)
    assert off(got, right) < limit(dtype)
    # The control: another expert's share of one token is a twentieth more.
    right[0] *= 1.05
    assert off(got[0], right[0]) > limit(dtype)


def double_a_scale(w13: Matrix, w2: Matrix) -> None:
    w2.scales[0, 17, 0] *= 2


def double_a_scale_of_w3(w13: Matrix, w2: Matrix) -> None:
    w13.scales[0, len(w13.numbers[0]) // 2 + 9, -1] *= 2


def swap_two_rows(w13: Matrix, w2: Matrix) -> None:
    w2.numbers[0, [16, 17]] = w2.numbers[0, [17, 16]]


def swap_two_columns(w13: Matrix, w2: Matrix) -> None:
    w13.numbers[0, :, [3, 11]] = w13.numbers[0, :, [11, 3]]


def move_a_zero_point(w13: Matrix, w2: Matrix) -> None:
    assert w2.zeros is not None
    w2.zeros[0, 17, 0] ^= 4


FAULTS = (double_a_scale, double_a_scale_of_w3, swap_two_rows, swap_two_columns, move_a_zero_point)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("how", ["awq g128", "bytes awq g128"])
def test_a_fault_is_seen(how: str, fault: Callable[[Matrix, Matrix], None]) -> None:
    got, right = run(how, "plain", torch.float16, SHAPES["small"], fault)
    rows = [17] if fault in (double_a_scale, swap_two_rows, move_a_zero_point) else range(got.shape[1])
    assert off(got[0, rows], right[0, rows]) > 3 * limit(torch.float16)
    # Other rows of w2 are as they should be.
    if len(rows) == 1:
        others = [row for row in range(got.shape[1]) if row not in (16, 17)]
        assert off(got[:, others], right[:, others]) < limit(torch.float16)


def test_a_broken_expert_stays_where_it_is() -> None:
    def broken(w13: Matrix, w2: Matrix) -> None:
        w2.scales[0] = float("nan")
        w13.scales[1] = float("nan")

    got, right = run("marlin g128", "plain", torch.float16, SHAPES["small"], broken)
    sound = ~got.isnan().any(1)
    assert got[0].isnan().all()
    assert sound.any()
    assert off(got[sound], right[sound]) < limit(torch.float16)


def test_all_in_one_tensor() -> None:
    """Slots among 4-bit experts, where the shared expert has the same format."""
    weights, w13, w2 = made("marlin g128", 4, 256, 128, torch.float16)
    states = draw(2, 256, seed=4, dtype=torch.float16)
    ids = routed("even", 2, 3, 2, 1)
    topk_weights = draw(2, 3, seed=9).sigmoid()
    got = experts_once(states, weights, topk_weights, ids)
    shared = ExpertWeights(w13.exactly()[3:], w2.exactly()[3:])
    right = expected(states, ExpertWeights(w13.exactly()[:3], w2.exactly()[:3]), shared, topk_weights, ids)
    assert off(got, right) < limit(torch.float16)
    # The control: each expert's neighbour.
    others = ExpertWeights(w13.exactly()[1:], w2.exactly()[1:])
    assert off(got, expected(states, others, shared, topk_weights, ids)) > 0.1
