"""The audit: what was not written exactly once stops the first load."""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fse_patch.errors import AuditError
from fse_patch.fusion_core.weights.audit import Key, SlotAudit, clear_padding, is_poisoned, marks, poison
from fse_patch.fusion_core.weights.remap import SlotTensor

SLOTS = range(4, 6)
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FP8 = [
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]
INTEGERS = [torch.int8, torch.uint8, torch.int32, torch.int64]


def audit(
    layers: tuple[int, ...] = (0, 3), suffixes: tuple[str, ...] = ("weight", "weight_scale")
) -> SlotAudit:
    made = SlotAudit("main")
    for layer in layers:
        made.expect(layer, SLOTS, set(suffixes))
    return made


def load(made: SlotAudit, keys: list[Key], poisoned: tuple[int, ...] = ()) -> None:
    made.begin()
    for layer, slot, shard, suffix in keys:
        made.wrote(SlotTensor(layer, slot, shard, suffix, torch.zeros(1)))
    made.finish(list(poisoned))


def keys_of(made: SlotAudit) -> list[Key]:
    return sorted(made.expected)


def test_every_part_of_every_slot_is_expected() -> None:
    made = audit()
    assert len(made.expected) == 2 * 2 * 3 * 2
    assert keys_of(made)[0] == (0, 4, "w1", "weight")
    assert keys_of(made)[-1] == (3, 5, "w3", "weight_scale")


def test_all_written_once_passes() -> None:
    made = audit()
    assert made.slots_loaded == 0
    load(made, keys_of(made))
    assert made.slots_loaded == 2 * 2
    assert made.loads == 1


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_part_that_is_missing_twice_or_foreign_stops_the_load(data: st.DataObject) -> None:
    made = audit()
    keys = keys_of(made)
    one = data.draw(st.sampled_from(keys))
    foreign = data.draw(
        st.sampled_from([(9, *one[1:]), (one[0], 6, *one[2:]), (*one[:3], "weight_scale_inv")])
    )
    for words, written in [
        ("never written", [k for k in keys if k != one]),
        ("written more than once", [*keys, one]),
        ("not expected", [*keys, foreign]),
    ]:
        order = data.draw(st.permutations(written))
        named = foreign if words == "not expected" else one
        place = "layer {} slot {} {}_{}".format(*named)
        with pytest.raises(AuditError, match=rf"1 shared slot tensors {words}, first: {re.escape(place)};"):
            load(audit(), order)
    load(audit(), data.draw(st.permutations(keys)))  # control: the same parts, all of them once


def test_every_error_says_that_the_model_is_not_served() -> None:
    made = audit()
    with pytest.raises(AuditError) as error:
        load(made, keys_of(made)[1:])
    assert str(error.value) == (
        "main model: 1 shared slot tensors never written, first: layer 0 slot 4 w1_weight; "
        "the model is not served"
    )
    for poisoned, unrouted in (([3], []), ([], [3])):
        made.written.update(keys_of(made)[:1])
        with pytest.raises(AuditError, match=r"; the model is not served$"):
            made.finish(poisoned, unrouted_layers=unrouted)


def test_the_first_of_several_is_named() -> None:
    with pytest.raises(
        AuditError, match=r"main model: 24 shared .*never written, first: layer 0 slot 4 w1_weight"
    ):
        load(audit(), [])


def test_poison_that_is_left_stops_the_load() -> None:
    with pytest.raises(AuditError, match=r"unwritten values .* layers \[3\]"):
        load(audit(), keys_of(audit()), poisoned=(3,))


def test_a_load_that_failed_is_not_the_first() -> None:
    made = audit()
    for _ in range(2):
        with pytest.raises(AuditError, match="never written"):
            load(made, keys_of(made)[1:])
    assert made.loads == 0
    load(made, keys_of(made))
    assert made.loads == 1


def test_later_loads_are_counted_and_not_enforced() -> None:
    made = audit()
    load(made, keys_of(made))
    load(made, [k for k in keys_of(made) if k[0] == 3], poisoned=(0,))
    assert (made.loads, made.slots_loaded) == (2, 4)  # those of layer 0 are still there
    load(made, [])
    assert (made.loads, made.slots_loaded) == (3, 4)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_slot_counts_when_all_of_it_is_written(data: st.DataObject) -> None:
    made = audit()
    missing = data.draw(st.sets(st.sampled_from(keys_of(made)), max_size=6))
    with pytest.raises(AuditError) if missing else nullcontext():
        load(made, [k for k in keys_of(made) if k not in missing])
    assert made.slots_loaded == 4 - len({key[:2] for key in missing})


def written(rows: torch.Tensor) -> torch.Tensor:
    """The rows with an ordinary value."""
    return rows.copy_(torch.ones(rows.shape).to(rows.dtype))


@pytest.mark.parametrize("dtype", [*FLOATS, *FP8], ids=str)
def test_poison_is_seen_until_the_last_element_is_written(dtype: torch.dtype) -> None:
    rows = torch.zeros(5, 2, 3, 4).to(dtype)
    before = rows[:3].clone()
    poison(rows[3:])
    assert torch.equal(rows[:3].float(), before.float())
    assert not is_poisoned(rows[:3])
    assert is_poisoned(rows[3:])
    assert bool(torch.isnan(rows[3:].float()).all())
    written(rows[3])
    written(rows[4, 0])
    written(rows[4, 1, :2])
    assert is_poisoned(rows[3:])  # one row of one projection of one slot is left
    written(rows[4, 1, 2])
    assert not is_poisoned(rows[3:])


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers_have_no_poison(dtype: torch.dtype) -> None:
    rows = torch.full((2, 3), 7, dtype=dtype)
    poison(rows)
    assert bool((rows == 7).all())
    assert not is_poisoned(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
def test_tensors_without_data_are_left_alone(dtype: torch.dtype) -> None:
    rows: Any = torch.empty(2, 3, dtype=dtype, device="meta")
    poison(rows)
    assert not is_poisoned(rows)


def test_poison_is_made_where_no_default_device_reaches() -> None:
    rows = torch.zeros(2, 3).to(torch.float8_e4m3fn)
    with torch.device("meta"):  # engines build layers with a device of their own as the default
        poison(rows)
    assert is_poisoned(rows)


def test_control_zeros_are_no_poison() -> None:
    assert not is_poisoned(torch.zeros(2, 3))
    assert not is_poisoned(torch.full((2,), float("inf")))


def test_an_update_before_any_load_is_counted_and_not_enforced() -> None:
    made = audit()
    made.begin()
    made.finish([], update=True)
    assert made.loads == 1


@pytest.mark.parametrize("dtype", [*FLOATS, *FP8], ids=str)
def test_a_routed_expert_that_never_came_shows(dtype: torch.dtype) -> None:
    experts = torch.zeros(6, 4, 3).to(dtype)
    for elements in marks(experts):
        poison(elements)
    for expert in range(6):
        for half in (slice(0, 2), slice(2, 4)):
            assert any(map(is_poisoned, marks(experts)))
            experts[expert, half] = torch.ones(2, 3).to(dtype)
    assert not any(map(is_poisoned, marks(experts)))


def test_an_expert_that_was_not_written_stops_the_load() -> None:
    made = audit()
    made.begin()
    for layer, slot, shard, suffix in keys_of(made):
        made.wrote(SlotTensor(layer, slot, shard, suffix, torch.zeros(1)))
    with pytest.raises(AuditError, match=r"routed experts of layers \[3\] were never written"):
        made.finish([], unrouted_layers=[3])
    assert made.loads == 0


def test_padding_is_no_unwritten_weight() -> None:
    width, padded, hidden = 3, 5, 4
    slots = {"w13_weight": torch.empty(2, 2 * padded, hidden), "w2_weight": torch.empty(2, hidden, padded)}
    for rows in slots.values():
        poison(rows)
    clear_padding(slots, width)
    halves = slots["w13_weight"].unflatten(1, (2, padded))
    assert bool(halves[:, :, :width].isnan().all())
    assert bool(slots["w2_weight"][:, :, :width].isnan().all())
    assert not is_poisoned(halves[:, :, width:])
    assert not is_poisoned(slots["w2_weight"][:, :, width:])
    assert not bool(halves[:, :, width:].any())
    assert not bool(slots["w2_weight"][:, :, width:].any())
    # The control: written whole, but for the padding, nothing is left to find.
    halves[:, :, :width] = slots["w2_weight"][:, :, :width] = 1.0
    assert not any(map(is_poisoned, slots.values()))


@pytest.mark.parametrize(
    ("w13", "w2"),
    [
        ((2, 12, 4), (2, 4, 5)),  # w13 has no padding of the same size
        ((2, 10, 4, 1), (2, 4, 5)),
        ((2, 10, 4), (2, 4, 5, 1)),
        ((2, 10), (2, 4, 5)),
        ((2, 10, 4), (2, 20)),
    ],
)
def test_weights_of_another_layout_have_no_padding_to_clear(
    w13: tuple[int, ...], w2: tuple[int, ...]
) -> None:
    slots = {"w13_weight": torch.ones(w13), "w2_weight": torch.ones(w2)}
    clear_padding(slots, 3)
    assert all(bool(rows.all()) for rows in slots.values())
    for name in slots:
        one = {name: slots[name]}
        clear_padding(one, 3)
        assert bool(one[name].all())


def test_only_plain_weights_have_marks() -> None:
    assert marks(torch.zeros(6, 4)) == []
    assert marks(torch.zeros(6, 4, 3, 1)) == []
    assert [mark.shape for mark in marks(torch.zeros(6, 4, 3))] == [(6,), (6,)]
