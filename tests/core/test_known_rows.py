"""Rows that an engine has packed since they were loaded are told from rows that it has left."""

from __future__ import annotations

import pytest
import torch

from fse_patch.adapters.load import KnownRows

ROWS = torch.arange(1.0, 9.0).reshape(1, 2, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int32])
def test_rows_that_are_left_hold_and_packed_ones_do_not(dtype: torch.dtype) -> None:
    loaded = {"weight": ROWS.to(dtype), "scale": torch.tensor(0.5)}
    seen = KnownRows()
    seen.note(loaded)
    packed = ROWS.transpose(1, 2).contiguous().reshape(1, 2, 4).to(dtype)
    assert not seen.are_as_loaded({**loaded, "weight": packed})
    assert not seen.are_as_loaded({"weight": loaded["weight"]})
    assert seen.are_as_loaded(loaded)


def test_what_was_left_once_may_be_updated_again() -> None:
    seen = KnownRows()
    seen.note({"weight": ROWS})
    assert seen.are_as_loaded({"weight": ROWS})
    assert seen.are_as_loaded({"weight": ROWS * 2})


def test_nothing_holds_before_a_load() -> None:
    assert not KnownRows().are_as_loaded({"weight": ROWS})
    assert not KnownRows().are_as_loaded({})
