"""A head in 8 bits: its rounding, the proof of every row, and what it costs; each with faults that show."""

from __future__ import annotations

from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")

from fse_patch.fusion_core.proof import head  # noqa: E402
from fse_patch.fusion_core.quant.int8_groups import Int8Rows, quantised, renew  # noqa: E402

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
N, K = 640, 256


def made(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(N, K, generator=draw) * 0.02).to(dtype)


def logits(states: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (states.float() @ weight.float().T).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_value_is_off_by_half_a_scale_at_most(dtype: torch.dtype) -> None:
    weight = made(dtype)
    weight[3, :32] = 0  # a group of zeros has no scale
    held = quantised(weight)
    steps = (held.rows(0, N) - weight.float()).unflatten(1, (-1, 32)).abs() / held.scales.float()[:, :, None]
    # Where the scale was rounded down, its largest value goes a little beyond 127 steps.
    assert float(steps.nan_to_num(0).max()) <= 0.5 + 127 * torch.finfo(dtype).eps
    assert torch.equal(held.rows(3, 4)[0, :32], torch.zeros(32))
    assert torch.equal(held.rows(5, 9), held.rows(0, N)[5:9])
    assert held.nbytes == N * K + N * K // 32 * dtype.itemsize


def test_the_same_memory_takes_another_matrix() -> None:
    held = quantised(made(torch.bfloat16))
    places = held.values.data_ptr(), held.scales.data_ptr()
    renew(held, made(torch.bfloat16, seed=1))
    assert places == (held.values.data_ptr(), held.scales.data_ptr())
    assert torch.equal(held.rows(0, N), quantised(made(torch.bfloat16, seed=1)).rows(0, N))


def doubled(held: Int8Rows, group: int) -> None:
    held.scales[77, group] *= 2


def swapped(held: Int8Rows, _: int) -> None:
    held.values[[5, 300]], held.scales[[5, 300]] = held.values[[300, 5]], held.scales[[300, 5]]


def without_a_group(held: Int8Rows, group: int) -> None:
    held.values[639, group * 32 : group * 32 + 32] = 0


FAULTS: list[tuple[Callable[[Int8Rows, int], None], set[int]]] = [
    (doubled, {77}),
    (swapped, {5, 300}),
    (without_a_group, {639}),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("fault", "rows"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_rows(fault: Callable[[Int8Rows, int], None], rows: set[int], dtype: torch.dtype) -> None:
    weight = made(dtype)
    states = head.random_states(head.CHECKED, K, weight.device).to(dtype)
    stock = logits(states, weight, dtype)
    held = quantised(weight)
    assert head.row_fault(states, logits(states, held.rows(0, N), dtype), stock, held.scales) is None
    for group in range(K // 32):
        held = quantised(weight)
        fault(held, group)
        # The proof knows the scales that it was given: those of the fault.
        found = head.row_fault(states, logits(states, held.rows(0, N), dtype), stock, held.scales)
        assert found is not None
        assert found.row in rows
        assert str(found).startswith(f"row {found.row}: off by ")


def test_what_is_no_number_is_a_fault() -> None:
    weight = made(torch.float32)
    states = head.random_states(4, K, weight.device)
    stock, held = logits(states, weight, torch.float32), quantised(weight)
    ours = stock.clone()
    ours[2, 10] = float("nan")
    found = head.row_fault(states, ours, stock, held.scales)
    assert found is not None
    assert found.row == 10


def cost(weight: torch.Tensor, held: Int8Rows, parts: int = 1, text: bool = False) -> head.Cost:
    """The cost, with the rows shared out over so many processes."""
    size = N // parts
    shards = [slice(i * size, (i + 1) * size) for i in range(parts)]
    states = head.text_states(weight[:200]) if text else head.random_states(200, K, weight.device)
    scale = head.scale_of([head.spread_of(states, weight[s], size) for s in shards])
    return head.cost_of(
        [
            head.part_of(states * scale, weight[s], Int8Rows(held.values[s], held.scales[s]), size, s.start)
            for s in shards
        ]
    )


@pytest.mark.parametrize("text", [False, True])
def test_cost(text: bool) -> None:
    weight = made(torch.bfloat16)
    held = quantised(weight)
    whole = cost(weight, held, text=text)
    assert whole.allowed
    assert 0.001 < whole.difference < head.HEAD_DIFFERENCE
    assert whole.agreement > 0.95
    # Processes that share the rows find the same.
    shared = cost(weight, held, 4, text)
    assert shared.agreement == whole.agreement
    assert shared.difference == pytest.approx(whole.difference, rel=1e-3)
    # Against itself there is no cost.
    same = quantised(held.rows(0, N))
    assert cost(held.rows(0, N), same, text=text).difference < 1e-5


def test_cost_of_a_head_with_outliers_is_too_much() -> None:
    weight = made(torch.bfloat16)
    weight[:, ::32] = torch.where(made(torch.float32, seed=2)[:, ::32] > 0, 2.0, -2.0).bfloat16()
    found = cost(weight * torch.tensor([0.0] + [1.0] * (K - 1)).bfloat16(), quantised(weight))
    assert not found.allowed


def test_cost_of_rows_that_stand_elsewhere_is_too_much() -> None:
    weight = made(torch.bfloat16)
    held = quantised(weight.roll(1, 0))
    found = cost(weight, held)
    assert found.agreement < 0.1
    assert not found.allowed


def test_no_number_is_not_allowed() -> None:
    assert not head.Cost(1, float("nan"), 0.0).allowed
    assert not head.Cost(1, 1.0, float("nan")).allowed


def test_states_spread_logits_as_models_do() -> None:
    weight = made(torch.float32)
    states = head.random_states(64, K, weight.device)
    scale = head.scale_of([head.spread_of(states, weight, N)])
    assert float((states * scale @ weight.T).std()) == pytest.approx(head.SPREAD, rel=0.01)
