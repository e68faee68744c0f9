"""The table of planted faults: enough of them, each with what plants it and words of its own."""

from __future__ import annotations

import importlib
import re
from collections import Counter

from ..planted.altered import ALTER
from ..planted.plant import PLANTS
from ..planted.table import BOTH, DEFENCES, FAULTS, WORDS

MODULES = ("tensors", "stream", "loading", "weighing", "routing", "building", "deciding")


def test_every_fault_can_be_planted_and_none_is_left_out() -> None:
    for module in MODULES:
        importlib.import_module(f"tests.planted.{module}")
    assert {f.name for f in FAULTS.values() if f.altered} == set(ALTER)
    assert {f.name for f in FAULTS.values() if not f.altered} == set(PLANTS)


def test_there_are_enough_for_each_engine_and_each_defence() -> None:
    for engine in BOTH:
        names = {f.name for f in FAULTS.values() if engine in f.engines}
        assert len(names) >= 90
        assert 8 <= sum(f.sample for f in FAULTS.values() if engine in f.engines) <= 20
    found = Counter(f.defence for f in FAULTS.values())
    assert set(found) == set(DEFENCES)


def test_an_outcome_is_matched_by_its_words_and_its_kind() -> None:
    for fault in FAULTS.values():
        words = fault.words or WORDS[fault.defence]
        assert re.compile(words)
        assert not fault.catches("")
        assert not fault.catches("stock, and nothing said so")
        assert not fault.catches("KeyError: something else")
