"""Every kernel against its reference in float64: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fse_patch.fusion_core.decision.outcome import RoutingSpec
from fse_patch.fusion_core.kernels import append, experts, gated_mlp, launch, route, router_logits
from fse_patch.fusion_core.kernels.expert_weights import ExpertWeights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16]
# Sizes that are no power of two, with rests in every tile.
SHAPES = [(1, 96, 40, 7, 2, 1), (3, 128, 32, 16, 4, 2), (3, 192, 48, 12, 3, 4)]
if DEVICE == "cuda":
    SHAPES += [(1, 2048, 512, 512, 10, 1), (4, 4096, 128, 512, 10, 1), (2, 4096, 1408, 128, 8, 1)]
QWEN = RoutingSpec("softmax", True)
GLM = RoutingSpec("sigmoid", True, 2.5, has_correction_bias=True)
SPECS = {
    "qwen": QWEN,
    "qwen2": replace(QWEN, renormalize=False),
    "glm": GLM,
    "glm_no_bias": replace(GLM, has_correction_bias=False),
    "glm_groups": replace(GLM, num_expert_group=4, topk_group=2),
    "groups_no_bias": replace(GLM, num_expert_group=4, topk_group=2, has_correction_bias=False),
}


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(DEVICE)


def chosen(tokens: int, routed: int, top_k: int) -> torch.Tensor:
    """Different experts for each token, [tokens, top_k]."""
    generator = torch.Generator().manual_seed(6)
    return torch.stack([torch.randperm(routed, generator=generator)[:top_k] for _ in range(tokens)])


def off(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative error; NaN never passes."""
    found = float((got.double() - wanted.double()).norm() / wanted.double().norm())
    return found if found == found else float("inf")


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    ("experts_", "top_k", "slots"), [(16, 4, 1), (12, 3, 2), (128, 8, 4), (512, 10, 1), (64, 16, 8)]
)
def test_route(spec: str, experts_: int, top_k: int, slots: int) -> None:
    how = SPECS[spec]
    gated = how.scoring == "softmax"
    logits = draw(9, experts_ + gated, seed=experts_, scale=2.0)
    bias = draw(experts_, seed=1, scale=0.1) if how.has_correction_bias else None
    ids = range(experts_, experts_ + slots)
    got = route.route(logits, top_k, ids, how, bias, 0.4)
    wanted = route.reference(logits.double(), top_k, ids, how, bias, 0.4)
    assert torch.equal(got[1], wanted[1])
    assert off(got[0], wanted[0]) < 1e-6
    # The control: another factor on the slots shows.
    assert off(got[0], route.reference(logits.double(), top_k, ids, how, bias, 0.404)[0]) > 1e-5


@pytest.mark.parametrize("spec", ["qwen", "glm_no_bias"])
def test_of_equal_experts_the_first_are_chosen(spec: str) -> None:
    logits = torch.full((3, 21), -1.0, device=DEVICE)
    logits[0, :] = 0.0
    logits[0, :7] = -0.0  # as large as the other zeros
    logits[1, 11:15] = 2.0
    logits[2, :] = float("-inf")
    logits[2, 5] = -3.0
    _, ids = route.route(logits, 4, range(20, 21), SPECS[spec])
    wanted = [[0, 1, 2, 3, 20], [11, 12, 13, 14, 20], [5, 0, 1, 2, 20]]
    assert ids.tolist() == wanted
    # The control: an expert that is a little larger comes first.
    logits[0, 9] = 1e-3
    assert route.route(logits, 4, range(20, 21), SPECS[spec])[1][0].tolist() == [9, 0, 1, 2, 20]


@pytest.mark.parametrize("columns", [64, 1500, 2048])
def test_route_clears_what_it_is_given(columns: int) -> None:
    logits, beside = draw(3, 21, seed=0), torch.full((5, columns), float("nan"), dtype=torch.bfloat16)
    ids = range(20, 21)
    got = route.route(logits, 4, ids, QWEN, zeros=beside[1:4])
    assert all(torch.equal(a, b) for a, b in zip(got, route.route(logits, 4, ids, QWEN), strict=True))
    assert not beside[1:4].any()
    # Not a row more.
    assert beside[0].isnan().all()
    assert beside[4].isnan().all()


def test_route_takes_16_at_most() -> None:
    with pytest.raises(ValueError, match="16 at most"):
        route.route(draw(1, 40, seed=0), 17, range(39, 40), QWEN)


@pytest.mark.parametrize("shape", [*SHAPES, (19, 1000, 0, 12, 0, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_router_logits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens, hidden, _, experts_, _, _ = shape
    states = draw(tokens, hidden, seed=2, dtype=dtype)
    gate = draw(experts_ + 1, hidden, seed=3, dtype=dtype, scale=0.05)
    wanted = router_logits.reference(states, gate)
    got = router_logits.router_logits(states, gate)
    assert off(got, wanted) < 1e-5
    assert off(got, wanted.roll(1, 1)) > 0.1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_experts(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens, hidden, width, experts_, top_k, slots = shape
    states = draw(tokens, hidden, seed=4, dtype=dtype)
    w13 = draw(experts_ + slots, 2 * width, hidden, seed=5, dtype=dtype, scale=0.05)
    w2 = draw(experts_ + slots, hidden, width, seed=6, dtype=dtype, scale=0.05)
    ids = chosen(tokens, experts_, top_k)
    ids = torch.cat([ids, torch.arange(experts_, experts_ + slots).expand(tokens, slots)], 1).int().to(DEVICE)
    weights = draw(tokens, top_k + slots, seed=7).sigmoid()
    got = experts.small_experts(states, ExpertWeights(w13, w2), weights, ids)
    wanted = experts.reference(states, w13, w2, weights, ids)
    limit = 1e-2 if dtype == torch.bfloat16 else 1e-3
    assert off(got, wanted) < limit
    # The control: the last slot's weight is wrong.
    wrong = weights.clone()
    wrong[:, -1] *= 0.5
    assert off(got, experts.reference(states, w13, w2, wrong, ids)) > 2 * limit


@pytest.mark.parametrize("slots", [1, 2, 4, 8])
@pytest.mark.parametrize("gated", [True, False])
def test_append(slots: int, gated: bool) -> None:
    weights, ids = (
        draw(5, 9, seed=8)[:, :6],
        torch.randint(0, 40, (5, 7), dtype=torch.int32, device=DEVICE)[:, :6],
    )
    gate = draw(5, 1, seed=9) if gated else None
    got = append.append(weights, ids, range(40, 40 + slots), gate, 0.4)
    wanted = append.reference(weights, ids, range(40, 40 + slots), gate, 0.4)
    assert torch.equal(got[1], wanted[1])
    assert off(got[0], wanted[0]) < 1e-6
    assert off(got[0], append.reference(weights, ids, range(40, 40 + slots), gate, 0.5)[0]) > 1e-3
    assert got[0].is_contiguous()
    assert got[1].is_contiguous()


@pytest.mark.parametrize("ranks", [2, 3])
def test_append_where_experts_are_spread(ranks: int) -> None:
    """Each token takes the slots of one process."""
    weights, ids = draw(7, 6, seed=8), torch.arange(42, device=DEVICE, dtype=torch.int32).view(7, 6)
    got = append.append(weights, ids, range(50, 52), None, 1.0, ranks)
    wanted = append.reference(weights, ids, range(50, 52), None, 1.0, ranks)
    assert torch.equal(got[1], wanted[1])
    assert torch.equal(got[0], wanted[0])
    # The control: without it, every token takes the same ones.
    assert not torch.equal(got[1], append.append(weights, ids, range(50, 52), None)[1])


def test_nothing_is_launched_to_append_to_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(append, "_append", None)
    ids = torch.empty(0, 6, dtype=torch.int32, device=DEVICE)
    got = append.append(draw(0, 6, seed=8), ids, range(40, 42), None)
    assert [tuple(part.shape) for part in got] == [(0, 8), (0, 8)]
    # The control: with a token it would be.
    with pytest.raises(TypeError):
        append.append(draw(1, 6, seed=8), ids.new_zeros(1, 6), range(40, 42), None)


def test_kernels_wait_for_what_was_launched_before() -> None:
    """In a graph, where launches overlap if anywhere: states come from a kernel that takes long."""
    hidden, width, experts_ = 256, 64, 16
    source = draw(512, hidden, seed=11, dtype=torch.bfloat16)
    gate = draw(experts_, hidden, seed=12, dtype=torch.bfloat16, scale=0.1)
    w13 = draw(experts_, 2 * width, hidden, seed=13, dtype=torch.bfloat16, scale=0.1)
    w2 = draw(experts_, hidden, width, seed=14, dtype=torch.bfloat16, scale=0.1)
    states = torch.zeros_like(source[:2])

    def chain() -> torch.Tensor:
        states.copy_(source.double().exp().log().bfloat16()[:2])
        logits = router_logits.router_logits(states, gate)
        weights, ids = route.route(logits, 4, range(experts_, experts_), QWEN)
        return experts.small_experts(states, ExpertWeights(w13, w2), weights, ids)

    got = chain()
    if DEVICE == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = chain()
        states.zero_()
        graph.replay()
        torch.cuda.synchronize()
    weights, ids = route.reference(
        router_logits.reference(source[:2], gate), 4, range(experts_, experts_), QWEN
    )
    wanted = experts.reference(source[:2], w13, w2, weights, ids)
    assert off(got, wanted) < 1e-2
    # The control: states of before.
    before = torch.zeros_like(states)
    assert off(experts.small_experts(before, ExpertWeights(w13, w2), weights.float(), ids), wanted) > 0.5


def test_launches_overlap_where_the_device_can() -> None:
    tensor = torch.empty(1, device=DEVICE)
    overlaps = DEVICE == "cuda" and torch.cuda.get_device_capability() >= launch.HOPPER
    assert launch.options(tensor)["PDL"] == overlaps
    assert launch.options(torch.empty(1)) == {"PDL": False}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("add", [True, False])
def test_gated_mlp(shape: tuple[int, ...], add: bool) -> None:
    tokens, hidden = shape[:2]
    states, mlp, beside = (draw(tokens, hidden, seed=s, dtype=torch.bfloat16) for s in (10, 11, 12))
    gate = draw(1, hidden, seed=13, dtype=torch.bfloat16, scale=0.05)
    residual = beside if add else None
    wanted = gated_mlp.reference(states, gate, mlp, residual)
    got = gated_mlp.gated_mlp(states, gate, mlp, residual)
    assert off(got, wanted) < 4e-3
    assert off(got, gated_mlp.reference(states, -gate, mlp, residual)) > 1e-2
