"""Routing of a fused layer against its definition in plain Python floats."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fse_patch.errors import AuditError
from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.decision.outcome import RoutingSpec
from fse_patch.fusion_core.forward.plan import ModeCounter
from fse_patch.fusion_core.forward.router import FusedRouter
from fse_patch.fusion_core.kernels.routing_reference import append_shared_slots, route

from .moe import Routed, moe_spec, wrong

GAP = 1e-9  # scores closer than this may be ordered either way


def separated(values: torch.Tensor) -> bool:
    """Whether no two values of a row are so close that rounding could order them."""
    ordered = values.sort(dim=-1).values
    return bool((ordered.diff(dim=-1) > GAP).all())


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> Routed:
    """Any routing of any family, ties excluded."""
    sigmoid = draw(st.booleans())
    groups = draw(st.integers(1, 8)) if sigmoid else 1
    size = draw(st.integers(2, 20)) if sigmoid else draw(st.integers(1, 130))
    kept = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, min(16, kept * size)))
    layout = ExpertLayout(groups * size, draw(st.integers(1, 8)), top_k, 8, 4)
    biased = sigmoid and draw(st.booleans())
    spec = RoutingSpec(
        "sigmoid" if sigmoid else "softmax",
        renormalize=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5, 0.3])),
        num_expert_group=groups,
        topk_group=kept,
        has_correction_bias=biased,
    )
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    tokens, experts = draw(st.integers(0, 4)), layout.num_routed
    if dtype is torch.float64:
        logits = torch.randn(tokens, experts, dtype=dtype) * draw(st.sampled_from([0.1, 1.0, 8.0]))
    else:
        # Eighths below 17 are exact in 16 bit too.
        logits = torch.stack(
            [*[torch.randperm(experts) / 8.0 - 8 for _ in range(tokens)], torch.zeros(experts)]
        )[:-1].double()
    bias = torch.randn(experts, dtype=torch.float64) * 0.5 if biased else None
    gate = torch.randn(tokens, 1, dtype=torch.float64) * 3 if draw(st.booleans()) else None
    gate = gate if gate is None else (gate * 8).round() / 8
    choice = logits if not sigmoid else logits.sigmoid() if bias is None else logits.sigmoid() + bias
    best = choice.unflatten(-1, (groups, size)).topk(2 if biased else 1, dim=-1).values.sum(dim=-1)
    assume(separated(choice) and separated(best))
    return Routed(layout, spec, logits, bias, gate)


def router_of(case: Routed, dtype: torch.dtype = torch.float64) -> FusedRouter:
    gate = case.gate
    return FusedRouter(
        3,
        moe_spec(case.layout, case.spec, "constant" if gate is None else "sigmoid_gate"),
        ModeCounter(),
        shared_gate=None if gate is None else lambda hidden: gate.to(dtype) + 0 * hidden[:, :1],
        correction_bias=None
        if case.bias is None
        else case.bias.to(torch.promote_types(dtype, torch.float32)),
    )


def routed(case: Routed, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = torch.zeros(case.logits.shape[0], case.layout.hidden_size, dtype=dtype)
    return router_of(case, dtype)(hidden, case.logits.to(dtype))


@settings(max_examples=200, deadline=None)
@given(cases())
def test_it_is_the_definition(case: Routed) -> None:
    weights, ids = routed(case)
    assert weights.dtype == torch.float64
    assert wrong(case, weights, ids, 1e-12) == []


@settings(max_examples=60, deadline=None)
@given(cases())
def test_slots_and_experts_are_distinct(case: Routed) -> None:
    _, ids = routed(case)
    layout = case.layout
    for row in ids.tolist():
        assert len(set(row)) == layout.fused_top_k
        assert sum(i >= layout.num_routed for i in row) == layout.num_shared_slots
        assert all(0 <= i < layout.num_experts for i in row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_other_dtypes_are_routed_in_float32(dtype: torch.dtype, data: st.DataObject) -> None:
    case = data.draw(cases(dtype=dtype))
    case_bias = None if case.bias is None else (case.bias * 64).round() / 64
    case = Routed(case.layout, case.spec, case.logits, case_bias, case.gate)
    choice = case.logits.sigmoid() + (0 if case_bias is None else case_bias)
    groups = choice.unflatten(-1, (case.spec.num_expert_group, -1)).topk(min(2, choice.shape[-1]), dim=-1)
    # float32 must order the scores as float64 does.
    far = [values.sort(dim=-1).values.diff(dim=-1) > 1e-5 for values in (choice, groups.values.sum(dim=-1))]
    assume(case.spec.scoring == "softmax" or all(bool(f.all()) for f in far))
    weights, ids = routed(case, dtype)
    assert weights.dtype == torch.float32
    assert wrong(case, weights, ids, 2e-6 * case.spec.routed_scaling_factor) == []


@settings(max_examples=60, deadline=None)
@given(cases(), st.booleans(), st.sampled_from([1.0, 0.25, 7.0]))
def test_routed_scale_and_renormalisation_leave_the_shared_slots_alone(
    case: Routed, renormalize: bool, scale: float
) -> None:
    other = case.with_spec(renormalize=renormalize, routed_scaling_factor=scale)
    k = case.layout.top_k
    before, after = routed(case)[0], routed(other)[0]
    assert torch.equal(before[:, k:], after[:, k:])
    if case.gate is None:
        assert torch.equal(after[:, k:], torch.ones_like(after[:, k:]))
    if renormalize:
        torch.testing.assert_close(after[:, :k].sum(dim=-1), torch.full_like(after[:, 0], scale))


def example(scoring: str = "sigmoid", gated: bool = True) -> Routed:
    """A fixed layer: 12 experts in 3 groups, 2 slots."""
    torch.manual_seed(0)
    sigmoid = scoring == "sigmoid"
    groups, kept = (3, 2) if sigmoid else (1, 1)
    spec = RoutingSpec("sigmoid" if sigmoid else "softmax", True, 2.5, groups, kept, sigmoid)
    logits = torch.randn(5, 12, dtype=torch.float64)
    bias = torch.randn(12, dtype=torch.float64) if sigmoid else None
    gate = torch.randn(5, 1, dtype=torch.float64) if gated else None
    return Routed(ExpertLayout(12, 2, 4, 8, 4), spec, logits, bias, gate)


def swapped(weights: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return weights[:, [1, 0, 2, 3, 4, 5]], ids


def doubled(weights: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return weights, ids[:, [0, 0, 2, 3, 4, 5]]


def scaled_slots(weights: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return weights * torch.tensor([1, 1, 1, 1, 2.5, 2.5]), ids


def one_slot_off(weights: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return weights * torch.tensor([1, 1, 1, 1, 1, 1.01]), ids


def slots_in_the_softmax(weights: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return weights / weights.sum(dim=-1, keepdim=True), ids


def slots_first(weights: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return weights.roll(2, dims=1), ids.roll(2, dims=1)


def strided(weights: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return weights.t().contiguous().t(), ids


def long_ids(weights: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return weights, ids.long()


@pytest.mark.parametrize(
    "fault",
    [swapped, doubled, scaled_slots, one_slot_off, slots_in_the_softmax, slots_first, strided, long_ids],
)
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_control_every_fault_is_seen(fault: object, scoring: str) -> None:
    case = example(scoring)
    assert wrong(case, *routed(case), 1e-12) == []
    assert wrong(case, *fault(*routed(case)), 1e-4) != []  # type: ignore[operator]


@pytest.mark.parametrize(
    "change",
    [
        {"renormalize": False},
        {"routed_scaling_factor": 1.0},
        {"num_expert_group": 1, "topk_group": 1},
        {"topk_group": 1},
        {"scoring": "softmax"},
    ],
    ids=str,
)
def test_control_every_part_of_the_definition_matters(change: dict[str, object]) -> None:
    case = example()
    assert wrong(case.with_spec(**change), *routed(case), 1e-4) != []


def test_control_the_bias_chooses_and_does_not_weigh() -> None:
    case = example()
    assert case.bias is not None
    unbiased = Routed(case.layout, case.spec, case.logits, torch.zeros_like(case.bias), case.gate)
    assert wrong(unbiased, *routed(case), 1e-4) != []
    weights, _ = route(case.logits, 4, case.spec, case.bias)
    torch.testing.assert_close(weights.sum(dim=-1), torch.full((5,), 2.5, dtype=torch.float64))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_dynamo_traces_it_whole(scoring: str, gated: bool) -> None:
    case = example(scoring, gated)
    eager, hidden = router_of(case), torch.zeros(5, 8, dtype=torch.float64)
    compiled = router_of(case)
    call = torch.compile(lambda h, x: compiled(h, x), backend="eager", fullgraph=True)
    for expected, found in zip(eager(hidden, case.logits), call(hidden, case.logits), strict=True):
        assert torch.equal(expected, found)
    assert eager.counter.by_mode() == {"fused": 1}
    assert compiled.counter.by_mode() == {}  # counting is for eager calls: a graph would count once


def test_control_dynamo_would_say_so() -> None:
    def breaks(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum().item() > 0 else x

    with pytest.raises(Exception, match=r"(?i)data-dependent|graph break|\.item\(\)"):
        torch.compile(breaks, backend="eager", fullgraph=True)(torch.ones(2))


def test_each_eager_call_is_counted_for_its_layer() -> None:
    router = router_of(example())
    for _ in range(3):
        router(torch.zeros(5, 8, dtype=torch.float64), example().logits)
    assert router.counter.layers() == [3]
    assert router.counter.by_mode() == {"fused": 3}
    router.counter.reset()
    assert router.counter.layers() == []


def test_the_control_touches_the_first_slot_alone() -> None:
    case = example()
    router, hidden = router_of(case), torch.zeros(5, 8, dtype=torch.float64)
    honest, _ = router(hidden, case.logits)
    router.control_factor = 1.01
    changed, _ = router(hidden, case.logits)
    torch.testing.assert_close(
        changed / honest, torch.tensor([[1, 1, 1, 1, 1.01, 1.0]]).double().expand(5, 6)
    )


def test_gate_and_bias_must_be_there_as_decided() -> None:
    layout = ExpertLayout(4, 1, 2, 8, 4)
    softmax, sigmoid = RoutingSpec("softmax", True), RoutingSpec("sigmoid", True, has_correction_bias=True)
    gated = moe_spec(layout, softmax)
    constant = moe_spec(layout, sigmoid, "constant")
    with pytest.raises(ValueError, match="gate disagree"):
        FusedRouter(0, gated, ModeCounter())
    with pytest.raises(ValueError, match="gate disagree"):
        FusedRouter(0, constant, ModeCounter(), shared_gate=lambda x: x, correction_bias=torch.zeros(4))
    with pytest.raises(ValueError, match="bias"):
        FusedRouter(0, constant, ModeCounter())
    with pytest.raises(ValueError, match="bias"):
        FusedRouter(0, gated, ModeCounter(), shared_gate=lambda x: x, correction_bias=torch.zeros(4))


def test_one_number_and_one_weight_a_token_are_appended_alike() -> None:
    weights, ids = torch.rand(3, 2), torch.zeros(3, 2, dtype=torch.int32)
    number = append_shared_slots(weights, ids, range(7, 9), 0.25)
    column = append_shared_slots(weights, ids, range(7, 9), torch.full((3, 1), 0.25, dtype=torch.bfloat16))
    assert all(torch.equal(a, b) for a, b in zip(number, column, strict=True))
    assert number[1].tolist() == [[0, 0, 7, 8]] * 3


def test_a_closed_layer_does_not_run() -> None:
    layout = ExpertLayout(4, 1, 2, 8, 8)
    router = FusedRouter(0, moe_spec(layout, shared_weight="constant"), ModeCounter())
    hidden, logits = torch.zeros(3, 8), torch.arange(12.0).reshape(3, 4)
    router(hidden, logits)
    router.closed = "not yet"
    with pytest.raises(AuditError, match="not yet"):
        router(hidden, logits)
