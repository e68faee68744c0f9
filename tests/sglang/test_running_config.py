"""Checkpoints of every recipe in SGLang's own configuration: alike without overrides, refused with any."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_checkpoints import RECIPES

from ..overrides import check
from ..running import Checkpoints
from ..vllm.processes import in_process

MADE = [name for name, recipe in RECIPES.items() if recipe.family and recipe.can_be_made()]


@pytest.mark.every_release
def test_configurations_are_those_of_the_checkpoints(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "sglang")
    found = in_process("tests.overrides:probe", "sglang", *(str(checkpoints.path(name)) for name in MADE))
    assert set(found) == set(MADE)
    check(found)
