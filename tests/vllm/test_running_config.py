"""Checkpoints of every recipe in vLLM's own configuration: alike without overrides, refused with any."""

from __future__ import annotations

import pytest
from tiny_checkpoints import RECIPES

from ..overrides import check
from .engine import Checkpoints
from .processes import in_process

MADE = [name for name, recipe in RECIPES.items() if recipe.family and recipe.can_be_made()]


@pytest.mark.every_release
def test_configurations_are_those_of_the_checkpoints(checkpoints: Checkpoints) -> None:
    folders = [str(checkpoints.path(name)) for name in MADE]
    found = in_process("tests.overrides:probe", "vllm", *folders)
    assert set(found) == set(MADE)
    check(found)
