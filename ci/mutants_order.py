"""A plugin of pytest for mutants: fast tests first, and no memory of functions while they are mapped."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

# In the folder that the tests run in; written by mutmut.
TIMES = Path("mutmut-stats.json")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort tests by the time that they took."""
    if TIMES.is_file():
        times = json.loads(TIMES.read_text())["duration_by_test"]
        items.sort(key=lambda item: times.get(item.nodeid, 0.0))


def pytest_runtest_setup() -> None:
    """Forget what functions of the project remember: a test is mapped to the functions that it calls."""
    if os.environ.get("MUTANT_UNDER_TEST") != "stats":
        return
    for name, module in list(sys.modules.items()):
        if name.startswith("fse_patch."):
            for value in list(vars(module).values()):
                if callable(clear := getattr(value, "cache_clear", None)):
                    clear()
