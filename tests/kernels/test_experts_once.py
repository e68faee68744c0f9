"""Each chosen expert read once: for every routing, in any company, with broken experts and tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fse_patch.fusion_core.kernels import experts, work_list
from fse_patch.fusion_core.kernels.expert_weights import ExpertWeights, Scales
from fse_patch.fusion_core.kernels.experts_once import experts_once
from fse_patch.fusion_core.kernels.once_tiles import takes, w2_tile, w13_tile, within

from .test_kernels import DEVICE, DTYPES, draw, off

# Tokens, H, I, E, k, S: sizes with rests in every tile.
SHAPES = [(3, 96, 40, 7, 2, 1), (9, 128, 48, 12, 3, 4)]
if DEVICE == "cuda":
    SHAPES += [(8, 2048, 512, 512, 10, 1), (16, 4096, 128, 512, 10, 1), (2, 4096, 1408, 128, 8, 1)]
    SHAPES += [(16, 2048, 1408, 60, 4, 4)]
ROUTINGS = ("even", "alike", "fours", "zipf")


def routed(kind: str, tokens: int, experts_: int, top_k: int, slots: int) -> torch.Tensor:
    """The ids of a routing: [tokens, k + S] int32."""
    draw_ = torch.Generator().manual_seed(tokens)
    odds = torch.ones(experts_)
    if kind == "zipf":
        odds = 1.0 / torch.arange(1, experts_ + 1).float()
    each = {"alike": tokens, "fours": 4}.get(kind, 1)
    rows = [torch.multinomial(odds, top_k, generator=draw_) for _ in range(-(-tokens // each))]
    ids = torch.stack(rows).repeat_interleave(each, 0)[:tokens]
    shared = torch.arange(experts_, experts_ + slots).expand(tokens, slots)
    return torch.cat([ids, shared], 1).int().to(DEVICE)


def lists_are(work: work_list.Work, ids: torch.Tensor) -> bool:
    """Whether all lists of ``work`` are those of ``ids``."""
    tokens, slots = ids.shape
    for got in (work.whole, work.parts):
        assert len(got.count) == -(-tokens // got.tokens)
        for number, part in enumerate(ids.split(got.tokens)):
            expected, rows = work_list.reference(part, got.columns)
            rows = torch.where(rows < 0, rows, rows + number * got.tokens * slots)
            count = int(got.count[number])
            if count != len(expected) or not torch.equal(got.experts[number, :count], expected):
                return False
            if not torch.equal(got.rows[number, :count], rows):
                return False
    return True


@pytest.mark.parametrize("of", [0, 4, 8])
@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_work_list(shape: tuple[int, ...], kind: str, of: int) -> None:
    tokens, _, _, experts_, top_k, slots = shape
    ids = routed(kind, tokens, experts_, top_k, slots)
    work = work_list.work_list(ids, experts_ + slots, of)
    assert (work.parts is work.whole) == (of == 0 or of >= tokens)
    assert lists_are(work, ids)
    # Experts that are elsewhere are in no list.
    ids[1, :-slots] = -1
    assert not lists_are(work, ids)
    assert lists_are(work_list.work_list(ids, experts_ + slots, of), ids)


def test_the_work_list_has_room_for_16_tokens() -> None:
    with pytest.raises(ValueError, match="17 tokens"):
        work_list.work_list(torch.zeros(17, 2, dtype=torch.int32), 2)


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of", [0, 4])
def test_experts_once(shape: tuple[int, ...], kind: str, dtype: torch.dtype, of: int) -> None:
    tokens, hidden, width, experts_, top_k, slots = shape
    states = draw(tokens, hidden, seed=4, dtype=dtype)
    w13 = draw(experts_ + slots, 2 * width, hidden, seed=5, dtype=dtype, scale=0.05)
    w2 = draw(experts_ + slots, hidden, width, seed=6, dtype=dtype, scale=0.05)
    ids = routed(kind, tokens, experts_, top_k, slots)
    weights = draw(tokens, top_k + slots, seed=7).sigmoid()
    tiles = w13_tile(tokens, hidden, False), replace(w2_tile(tokens, hidden, width, False), tokens=of)
    got = experts_once(states, ExpertWeights(w13, w2), weights, ids, tiles=tiles)
    expected = experts.reference(states, w13, w2, weights, ids)
    # The interpreter cuts bfloat16 off instead of rounding it.
    assert off(got, expected) < (0.005 if DEVICE == "cuda" or dtype == torch.float16 else 0.01)
    # The control: one slot of one token weighs otherwise.
    weights[0, -1] *= 1.5
    assert off(got[:1], experts.reference(states[:1], w13, w2, weights[:1], ids[:1])) > 0.01


def plain_once(
    states: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    return experts_once(states, ExpertWeights(w13, w2), weights, ids)


def fp8_once(
    states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    scales: Scales,
) -> torch.Tensor:
    return experts_once(states, ExpertWeights(w13, w2, scales), weights, ids)


# Rows and columns that share a scale; 0 for all.
BLOCKS = {"block": (128, 128), "small block": (32, 64), "channel": (1, 0), "tensor": (0, 0)}


def scaled(weights: torch.Tensor, block: tuple[int, int], halves: int) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 numbers, and scales [n, rows, columns] that make ``weights`` of them; w1 and w3 have their own."""
    _, out, inner = weights.shape
    rows, columns = (size or extent for size, extent in zip(block, (out // halves, inner), strict=True))
    parts, scales = [], []
    for part in weights.float().chunk(halves, 1):
        height = part.shape[1]
        padded = torch.nn.functional.pad(part, (0, -inner % columns, 0, -height % rows))
        tiles = padded.unflatten(1, (-1, rows)).unflatten(3, (-1, columns))
        scale = tiles.abs().amax((2, 4)) / 448
        parts.append((tiles / scale[:, :, None, :, None]).flatten(3).flatten(1, 2)[:, :height, :inner])
        scales.append(scale)
    return torch.cat(parts, 1).to(torch.float8_e4m3fn), torch.cat(scales, 1).contiguous()


def exact(weights: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], halves: int) -> torch.Tensor:
    """The weights in float64."""
    _, out, inner = weights.shape
    height = out // halves
    rows, columns = block[0] or height, block[1] or inner
    wide = torch.cat(
        [part.repeat_interleave(rows, 1)[:, :height] for part in scale.double().chunk(halves, 1)], 1
    ).repeat_interleave(columns, 2)[:, :, :inner]
    return weights.double() * wide


FP8_SHAPES = [(2, 256, 128, 5, 2, 1), (9, 128, 256, 6, 2, 2)]
if DEVICE == "cuda":
    FP8_SHAPES += [(8, 2048, 512, 512, 10, 1), (16, 4096, 128, 512, 10, 1), (8, 4096, 1408, 128, 8, 1)]


@pytest.mark.parametrize("kind", ["even", "alike"])
@pytest.mark.parametrize("how", BLOCKS)
@pytest.mark.parametrize("shape", FP8_SHAPES, ids=str)
def test_fp8(shape: tuple[int, ...], how: str, kind: str) -> None:
    tokens, hidden, width, experts_, top_k, slots = shape
    block = BLOCKS[how]
    states = draw(tokens, hidden, seed=4, dtype=torch.bfloat16)
    # Tokens of very different sizes: each has a factor of its own.
    states *= torch.logspace(-1, 2, tokens, device=DEVICE)[:, None].to(states.dtype)
    w13 = draw(experts_ + slots, 2 * width, hidden, seed=5, scale=0.05)
    w2 = draw(experts_ + slots, hidden, width, seed=6, scale=0.05)
    (w13, s13), (w2, s2) = scaled(w13, block, 2), scaled(w2, block, 1)
    ids = routed(kind, tokens, experts_, top_k, slots)
    weights = draw(tokens, top_k + slots, seed=7).sigmoid()
    got = fp8_once(states, w13, w2, weights, ids, Scales(s13, s2, block))
    expected = experts.reference(states, exact(w13, s13, block, 2), exact(w2, s2, block, 1), weights, ids)
    for token in range(tokens):
        assert off(got[token], expected[token]) < (0.004 if DEVICE == "cuda" else 0.01)
    # The control: one scale of the shared expert is half of what it is.
    s2[-1] *= 0.5
    expected = experts.reference(states, exact(w13, s13, block, 2), exact(w2, s2, block, 1), weights, ids)
    assert off(got, expected) > 0.01


def test_one_scale_for_all_of_w13() -> None:
    states, w13, w2, weights, ids = made("even")
    (w13, s13), (w2, s2) = scaled(w13, (0, 0), 2), scaled(w2, (0, 0), 1)
    alone = s13[:, :1].contiguous()
    got = fp8_once(states, w13, w2, weights, ids, Scales(alone, s2, (0, 0)))
    both = alone.expand(-1, 2, -1).contiguous()
    assert torch.equal(got, fp8_once(states, w13, w2, weights, ids, Scales(both, s2, (0, 0))))
    # The control: w3 has a scale of its own.
    assert not torch.equal(got, fp8_once(states, w13, w2, weights, ids, Scales(s13, s2, (0, 0))))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factors(dtype: torch.dtype) -> None:
    states = draw(9, 96, seed=1, dtype=dtype) * torch.logspace(-4, 4, 9, device=DEVICE)[:, None].to(dtype)
    states[3], states[4, 0], states[5, 0] = 0.0, float("inf"), float("nan")
    ids = routed("even", 9, 12, 3, 1)
    fitted = work_list.work_list(ids, 13, 4, states).fitted
    assert fitted is not None
    expected = work_list.fitted_reference(states)
    got = fitted.factors
    assert torch.equal(got, expected.factors)
    assert torch.equal(fitted.states.nan_to_num(), expected.states.nan_to_num())
    assert fitted.states[5, 0].isnan()
    # A token with NaN stays NaN by any factor.
    assert got[3:5].tolist() == [1.0, 1.0]
    fits = (states.float() * got[:, None]).abs().amax(1)
    fine = torch.tensor([0, 1, 2, 6, 7, 8], device=DEVICE)
    assert ((fits[fine] >= 2**13) & (fits[fine] < 2**14)).all()


def test_a_tile_in_two_blocks_of_scales_is_refused() -> None:
    states, w13, w2, weights, ids = made("even")
    scales = Scales(w13.float(), w2.float(), (128, 24))
    w13, w2 = (tensor.to(torch.float8_e4m3fn) for tensor in (w13, w2))
    assert not takes(ExpertWeights(w13, w2, scales))
    tiles = w13_tile(9, 128, True), w2_tile(9, 128, 48, True)
    with pytest.raises(ValueError, match="blocks of 128 x 24"):
        experts_once(states, ExpertWeights(w13, w2, scales), weights, ids, tiles=tiles)


def test_tiles_lie_in_one_block_of_scales() -> None:
    _, w13, w2, _, _ = made("even")

    def taken(block: tuple[int, int]) -> bool:
        return takes(ExpertWeights(w13, w2, Scales(w13, w2, block)))

    for block in ((128, 128), (16, 16), (48, 64), (1, 0), (0, 0)):
        assert taken(block)
        for tile in (w13_tile(9, 4096, True), w2_tile(4, 4096, 128, True)):
            cut = within(tile, block)
            assert block[0] <= 1 or block[0] % cut.rows == 0
            assert block[1] % cut.depth == 0
            assert min(cut.rows, cut.depth) >= 16
    assert not taken((8, 128))
    assert takes(ExpertWeights(w13, w2))


def made(kind: str) -> tuple[torch.Tensor, ...]:
    tokens, hidden, width, experts_, top_k, slots = SHAPES[-1]
    states = draw(tokens, hidden, seed=4, dtype=torch.bfloat16)
    w13 = draw(experts_ + slots, 2 * width, hidden, seed=5, dtype=torch.bfloat16, scale=0.05)
    w2 = draw(experts_ + slots, hidden, width, seed=6, dtype=torch.bfloat16, scale=0.05)
    weights = draw(tokens, top_k + slots, seed=7).sigmoid()
    return states, w13, w2, weights, routed(kind, tokens, experts_, top_k, slots)


def test_equal_tokens_give_equal_rows() -> None:
    states, w13, w2, weights, ids = made("alike")
    out = plain_once(states[:1].expand_as(states), w13, w2, weights[:1].expand_as(weights).contiguous(), ids)
    assert (out == out[:1]).all()


def test_the_order_of_tokens_changes_nothing() -> None:
    states, w13, w2, weights, ids = made("even")
    whole = plain_once(states, w13, w2, weights, ids)
    order = torch.arange(len(states) - 1, -1, -1)
    again = plain_once(states[order], w13, w2, weights[order].contiguous(), ids[order].contiguous())
    assert torch.equal(again, whole[order])


def test_a_broken_token_and_a_broken_expert_stay_where_they_are() -> None:
    states, w13, w2, weights, ids = made("even")
    whole = plain_once(states, w13, w2, weights, ids)
    states = states.clone()
    states[1, 3] = float("nan")
    broken = plain_once(states, w13, w2, weights, ids)
    assert broken[1].isnan().all()
    assert torch.equal(broken[0], whole[0])
    assert torch.equal(broken[2:], whole[2:])
    states, w13, w2, weights, ids = made("even")
    expert = int(ids[0, 0])
    who = (ids == expert).any(1)
    assert not who.all()
    for tensor in (w13, w2):
        harmed = tensor.clone()
        harmed[expert] = float("nan")
        given = (harmed, w2) if tensor is w13 else (w13, harmed)
        out = plain_once(states, *given, weights, ids)
        assert out[who].isnan().all()
        assert torch.equal(out[~who], whole[~who])
