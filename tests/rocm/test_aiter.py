"""Our calls of AITER on every profile of the fake, against references that share no code with either.

Each known fault of AITER has a test here with a control: the same call without our guard goes wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fse_patch.fusion_core.decision.outcome import RoutingSpec
from fse_patch.fusion_core.kernels import aiter
from fse_patch.fusion_core.kernels.aiter import AiterCaps, TopK

from ..fakes.aiter_kernels import Abort
from ..fakes.aiter_profiles import PROFILES, UNUSABLE, Profile, installed

SEVEN = [name for name, profile in PROFILES.items() if profile.state not in ("v0.1.4", "v0.1.5")
         and profile.state not in ("v0.1.10.post3", "v0.1.11")]  # fmt: skip
SLOW_PATH_IGNORES_STRIDES = [name for name, p in PROFILES.items() if p.strides != "all"]
GLM = RoutingSpec("sigmoid", True, 2.5, has_correction_bias=True)
TOKENS = 5


@pytest.fixture(params=PROFILES)
def caps(request: pytest.FixtureRequest) -> Iterator[AiterCaps]:
    with installed(PROFILES[request.param]):
        found = aiter.probe()
        assert found.why == ""
        yield found


def probed(name: str) -> Any:
    return installed(PROFILES[name])


def draw(columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Distinct logits; multiples of 1/16, which bfloat16 holds up to 16."""
    generator = torch.Generator().manual_seed(seed + columns)
    rows = [torch.randperm(min(columns, 512), generator=generator) for _ in range(TOKENS)]
    logits = torch.stack(rows) / 16.0 - 8.0
    return logits.repeat(1, math.ceil(columns / 512))[:, :columns].to(dtype)


def by_hand(logits: torch.Tensor, top_k: int, renormalize: bool) -> list[dict[int, float]]:
    """Softmax routing in plain Python floats."""
    out = []
    for row in logits.double().tolist():
        total = sum(math.exp(x) for x in row)
        best = sorted(range(len(row)), key=lambda i: (-row[i], i))[:top_k]
        chosen = {i: math.exp(row[i]) / total for i in best}
        norm = sum(chosen.values()) if renormalize else 1.0
        out.append({i: weight / norm for i, weight in chosen.items()})
    return out


def glm_by_hand(logits: torch.Tensor, bias: torch.Tensor, top_k: int, scale: float) -> list[dict[int, float]]:
    out = []
    for row in logits.double().tolist():
        score = [1 / (1 + math.exp(-x)) for x in row]
        choice = [s + b for s, b in zip(score, bias.double().tolist(), strict=True)]
        best = sorted(range(len(row)), key=lambda i: -choice[i])[:top_k]
        total = sum(score[i] for i in best)
        out.append({i: scale * score[i] / total for i in best})
    return out


def same(found: TopK, wanted: list[dict[int, float]]) -> bool:
    weights, ids = (part.tolist() for part in found)
    return all(
        dict(zip(i, w, strict=True)).keys() == right.keys()
        and all(abs(right[e] - x) < 1e-5 for e, x in zip(i, w, strict=True))
        for i, w, right in zip(ids, weights, wanted, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("experts", "top_k"), [(60, 4), (64, 8), (128, 8), (256, 8), (512, 10)])
def test_softmax_topk(
    caps: AiterCaps, experts: int, top_k: int, renormalize: bool, dtype: torch.dtype
) -> None:
    logits = draw(experts, dtype)
    found = aiter.softmax_topk(caps, logits, top_k, renormalize)
    assert same(found, by_hand(logits, top_k, renormalize))
    assert [part.dtype for part in found] == [torch.float32, torch.int32]
    assert all(part.is_contiguous() for part in found)
    # The control: other logits are other experts.
    assert not same(found, by_hand(draw(experts, dtype, seed=1), top_k, renormalize))


@pytest.mark.parametrize("experts", [60, 64])
def test_logits_that_are_a_part_of_wider_rows(caps: AiterCaps, experts: int) -> None:
    """Up to v0.1.10 no stride is honoured, and up to v0.1.19.post1 none on the slow path."""
    logits = draw(experts + 3)[:, :experts]
    assert logits.stride(0) == experts + 3
    assert same(aiter.softmax_topk(caps, logits, 4, True), by_hand(logits, 4, True))


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("experts", [60, 64])
def test_the_fake_ignores_strides_where_the_release_does(name: str, experts: int) -> None:
    """The control of the test before: the same call without the copy."""
    strides = PROFILES[name].strides
    honoured = strides == "all" or (strides == "powers of two" and experts == 64)
    with probed(name):
        found = aiter.probe()
        assert found.topk_softmax is not None
        logits = draw(experts + 3)[:, :experts]
        weights, ids, rows = torch.zeros(TOKENS, 4), *torch.zeros(2, TOKENS, 4, dtype=torch.int32)
        found.topk_softmax(weights, ids, rows, logits, True)
        assert same((weights, ids), by_hand(logits, 4, True)) == honoured
        # Only the first row is right: nothing smaller than two tokens would show it.
        assert same((weights[:1], ids[:1]), by_hand(logits[:1], 4, True))


def test_parameters_called_arg0_to_arg4() -> None:
    with probed("0.1.5, arg0 to arg4"):
        found = aiter.probe()
        logits = draw(64)
        assert same(aiter.softmax_topk(found, logits, 4, True), by_hand(logits, 4, True))
        assert found.topk_softmax is not None
        with pytest.raises((TypeError, RuntimeError)):  # the control: by name
            found.topk_softmax(topk_weights=None, topk_indices=None, token_expert_indices=None,
                               gating_output=logits, need_renorm=True)  # fmt: skip


@pytest.mark.parametrize("name", PROFILES)
def test_the_form_of_seven_arguments_is_found(name: str) -> None:
    with probed(name):
        found = aiter.probe()
        assert found.topk_takes_shared == (name in SEVEN)
        assert found.topk_softmax is not None
        if name not in SEVEN:  # the control: vllm-project/vllm#43873
            weights, ids, rows = torch.zeros(TOKENS, 5), *torch.zeros(2, TOKENS, 4, dtype=torch.int32)
            with pytest.raises((TypeError, RuntimeError)):
                found.topk_softmax(weights, ids, rows, draw(65), True, 1, "sigmoid")


@pytest.mark.parametrize("name", SEVEN)
@pytest.mark.parametrize("shared", [1, 2, 4, 8])
@pytest.mark.parametrize("experts", [64, 512])
@pytest.mark.parametrize("renormalize", [True, False])
def test_softmax_topk_with_shared_slots(name: str, experts: int, shared: int, renormalize: bool) -> None:
    with probed(name):
        found = aiter.probe()
        assert aiter.shared_refusal(found, experts, shared, padding=False) == ""
        logits = draw(experts + shared, seed=2)
        weights, ids = aiter.softmax_topk_shared(
            found, logits, 4, range(experts, experts + shared), renormalize
        )
        assert same((weights[:, :4], ids[:, :4]), by_hand(logits[:, :experts], 4, renormalize))
        assert ids[:, 4:].tolist() == [list(range(experts, experts + shared))] * TOKENS
        assert torch.allclose(weights[:, 4:], logits[:, experts:].sigmoid())


@pytest.mark.parametrize("name", SEVEN)
def test_what_the_form_of_seven_arguments_is_not_used_for(name: str) -> None:
    with probed(name):
        found = aiter.probe()
        for experts, shared in ((60, 1), (64, 3), (1024, 1), (64, 16)):
            assert aiter.shared_refusal(found, experts, shared, padding=False)
        assert aiter.shared_refusal(found, 64, 1, padding=True)
        # The controls: a form that the kernel does not have ends the process ...
        with pytest.raises(Abort):
            aiter.softmax_topk_shared(found, draw(67), 4, range(64, 67), True)
        # ... and the slow path reads and writes other rows.
        if name in SLOW_PATH_IGNORES_STRIDES:
            logits = draw(61)
            weights, ids = aiter.softmax_topk_shared(found, logits, 4, range(60, 61), True)
            assert not same((weights[:, :4], ids[:, :4]), by_hand(logits[:, :60], 4, True))


@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
def test_grouped_topk_has_the_scale_inside_once(caps: AiterCaps, groups: tuple[int, int]) -> None:
    spec = RoutingSpec("sigmoid", True, 2.5, *groups, has_correction_bias=True)
    logits, bias = draw(160), 0.01 * draw(160, seed=3)[0]
    assert aiter.grouped_refusal(caps, spec, 160, 8) == ""
    weights, ids = aiter.grouped_topk(caps, logits, bias, 8, spec)
    assert torch.allclose(weights.sum(-1), torch.full((TOKENS,), 2.5))
    if groups == (1, 1):
        assert same((weights, ids), glm_by_hand(logits, bias, 8, 2.5))
        assert not same((2.5 * weights, ids), glm_by_hand(logits, bias, 8, 2.5))  # control
    else:
        assert all(len({int(e) // 40 for e in row}) <= 2 for row in ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bias_is_never_read_in_another_dtype(caps: AiterCaps, dtype: torch.dtype) -> None:
    logits, bias = draw(160, dtype), draw(160, seed=3)[0] * 0.01
    assert same(aiter.grouped_topk(caps, logits, bias, 8, GLM), glm_by_hand(logits, bias, 8, 2.5))
    # The control: as it is stored, the kernel reads half of it, as pairs of numbers that nobody wrote.
    weights, ids = torch.zeros(TOKENS, 8), torch.zeros(TOKENS, 8, dtype=torch.int32)
    assert caps.biased_grouped_topk is not None
    caps.biased_grouped_topk(logits, bias, weights, ids, 1, 1, True, 2.5)
    assert not same((weights, ids), glm_by_hand(logits, bias, 8, 2.5))


def test_grouped_logits_that_are_a_part_of_wider_rows(caps: AiterCaps) -> None:
    logits, bias = draw(170)[:, :160], draw(160, seed=3)[0] * 0.01
    assert same(aiter.grouped_topk(caps, logits, bias, 8, GLM), glm_by_hand(logits, bias, 8, 2.5))


def test_what_grouped_topk_is_not_used_for(caps: AiterCaps) -> None:
    def refused(experts: int, top_k: int = 8, **changes: Any) -> bool:
        fields = {"scoring": "sigmoid", "renormalize": True, "routed_scaling_factor": 2.5} | changes
        return bool(
            aiter.grouped_refusal(caps, RoutingSpec(has_correction_bias=True, **fields), experts, top_k)
        )

    assert not refused(160)
    assert refused(160, num_expert_group=5, topk_group=2)
    assert refused(160, top_k=65)
    assert refused(160, renormalize=False)
    # DeepSeek's groups of 32 lose the scale in a large batch.
    assert refused(256, num_expert_group=8, topk_group=4)
    spec = RoutingSpec("sigmoid", True, 2.5, 5, 2, has_correction_bias=True)
    with pytest.raises(Abort):  # the control
        aiter.grouped_topk(caps, draw(160), draw(160)[0], 8, spec)


def test_ids_of_another_dtype_are_overwritten_without_a_word() -> None:
    """Why buffers are made here and never taken from an engine."""
    with probed("0.1.20, newest tag"):
        found = aiter.probe()
        assert found.topk_softmax is not None
        logits = draw(64)
        weights, rows = torch.zeros(TOKENS, 4), torch.zeros(TOKENS, 4, dtype=torch.int32)
        wide = torch.zeros(TOKENS, 4, dtype=torch.int64)
        found.topk_softmax(weights, wide, rows, logits, True)
        assert not same((weights, wide), by_hand(logits, 4, True))
    with probed("0.1.14, 7 hidden"), pytest.raises(RuntimeError):
        aiter.probe().topk_softmax(weights, wide, rows, logits, True)  # type: ignore[misc]


def test_rows_of_nan_choose_experts_that_exist(caps: AiterCaps) -> None:
    """Rows that pad a graph hold anything (vllm-project/vllm#39391)."""
    logits = draw(64)
    logits[2] = float("nan")
    weights, ids = aiter.softmax_topk(caps, logits, 4, True)
    assert bool(((ids >= 0) & (ids < 64)).all())
    kept = [0, 1, 3, 4]
    assert same((weights[kept], ids[kept]), by_hand(logits[kept], 4, True))


def test_padded_rows_weigh_nothing_and_name_an_expert() -> None:
    weights = torch.tensor([[0.5, 0.5, 0.9], [0.3, 0.7, 0.8], [0.0, 0.0, 0.7], [0.0, 1.0, 0.7]])
    ids = torch.tensor([[1, 2, 4], [-1, -1, 4], [0, 0, 4], [0, 3, 4]], dtype=torch.int32)
    masked, named = aiter.without_padding(weights, ids, 2)
    assert masked.tolist() == [weights[0].tolist(), [0.0] * 3, [0.0] * 3, weights[3].tolist()]
    assert named.tolist() == [[1, 2, 4], [0, 0, 0], [0, 0, 0], [0, 3, 4]]


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_is_called_aiter_and_is_not_usable(name: str) -> None:
    with installed(UNUSABLE[name]):
        found = aiter.probe()
    assert found.why
    assert found.topk_softmax is None
    assert not found.topk_takes_shared


def test_no_aiter_no_rocm_and_another_gpu() -> None:
    newest = PROFILES["newest"]
    with installed(None):
        assert "ModuleNotFoundError" in aiter.probe().why
    with installed(newest, hip=None):
        assert "not built for ROCm" in aiter.probe().why
    with installed(newest, gpu="gfx1201"):
        assert "gfx1201" in aiter.probe().why
    with installed(newest):  # the control
        assert aiter.probe().why == ""


def test_a_profile_that_is_left_leaves_nothing() -> None:
    with installed(PROFILES["0.1.12, 7 hidden"]):
        assert hasattr(torch.ops.aiter, "topk_softmax")
    assert not hasattr(torch.ops.aiter, "topk_softmax")
    with installed(Profile()):
        assert aiter.probe().topk_takes_shared
