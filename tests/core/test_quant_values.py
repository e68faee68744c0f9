"""Typed reading of a quantisation config: the values that are taken, and the words for all others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fse_patch.fusion_core.quant.claims import Doubt, flag, mapping, names, refuse_unknown_keys, whole, word

LARGE = 1 << 24


@pytest.mark.parametrize(
    ("read", "value"),
    [
        (lambda: whole({"a": 0}, "a"), 0),
        (lambda: whole({"a": LARGE - 1}, "a"), LARGE - 1),
        (lambda: whole({"a": 3}, "a", 7, low=3), 3),
        (lambda: whole({"a": None}, "a", 7), 7),
        (lambda: whole({}, "a", 7), 7),
        (lambda: flag({"a": False}, "a", True), False),
        (lambda: flag({"a": None}, "a", True), True),
        (lambda: flag({}, "a", False), False),
        (lambda: word({"a": "GEMM"}, "a", "x"), "gemm"),
        (lambda: word({"a": "GEMM"}, "a", "x", {"gemm"}), "gemm"),
        (lambda: word({"a": None}, "a", "X"), "x"),
        (lambda: word({}, "a", "X", {"x"}), "x"),
        (lambda: names({"a": ["p", ["q", ["r"]]], "b": "s"}, "a", "b"), {"p", "q", "r", "s"}),
        (lambda: names({"a": None, "c": "t"}, "a", "b"), set()),
        (lambda: mapping({"a": {"b": 1}}, "a"), {"b": 1}),
        (lambda: mapping({"a": None}, "a"), {}),
        (lambda: refuse_unknown_keys({"a": 1, "b": None}, {"a"}), None),
    ],
)
def test_what_is_taken(read: Callable[[], Any], value: Any) -> None:
    found = read()
    assert (set(found) if isinstance(found, tuple) else found) == value


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (lambda: whole({}, "a"), "'a' is None, no whole number from 0"),
        (lambda: whole({"a": -1}, "a"), "'a' is -1, no whole number from 0"),
        (lambda: whole({"a": 2}, "a", 7, low=3), "'a' is 2, no whole number from 3"),
        (lambda: whole({}, "a", 2, low=3), "'a' is 2, no whole number from 3"),
        (lambda: whole({"a": LARGE}, "a"), f"'a' is {LARGE}, no whole number from 0"),
        (lambda: whole({"a": 4.0}, "a"), "'a' is 4.0, no whole number from 0"),
        (lambda: whole({"a": True}, "a"), "'a' is True, no whole number from 0"),
        (lambda: flag({"a": 1}, "a", True), "'a' is 1, neither true nor false"),
        (lambda: flag({"a": "true"}, "a", True), "'a' is 'true', neither true nor false"),
        (lambda: word({"a": 3}, "a", "x"), "'a' is 3, which is not known"),
        (lambda: word({"a": "Y"}, "a", "x", {"x"}), "'a' is 'Y', which is not known"),
        (lambda: names({"a": ["p", [3]]}, "a"), "'a' holds 3, which is no name"),
        (lambda: names({"a": "p", "b": False}, "a", "b"), "'b' holds False, which is no name"),
        (lambda: mapping({"a": []}, "a"), "'a' is [], no object"),
        (lambda: refuse_unknown_keys({"c": 0, "b": 1}, {"a"}), "the key 'b' is not known"),
        (lambda: refuse_unknown_keys({"b": 1}, {"a"}, "in.it."), "the key 'in.it.b' is not known"),
    ],
)
def test_what_is_not_taken(read: Callable[[], Any], words: str) -> None:
    with pytest.raises(Doubt) as doubt:
        read()
    assert str(doubt.value) == words
