"""Models with nothing wrong: every recipe that fuses and can be made here, and drawn ones."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints

from ..running import Checkpoints
from . import drawn, suite

SAMPLE = ("glm4_moe_shared2_scale", "qwen3_next_mtp", "qwen3_5_vl_3d")
DRAWN = {model.name: model for model in map(drawn.draw, drawn.SEEDS)}
RECIPES = {
    name: recipe
    for name, recipe in tiny_checkpoints.RECIPES.items()
    if recipe.family and recipe.can_be_made()
}


def names() -> list[str]:
    """Of all clean starts; a draft has its checkpoint's name and more."""
    drafts = [f"{name} draft" for name, recipe in RECIPES.items() if recipe.draft != "none"]
    return [*RECIPES, *drafts, *DRAWN]


def models(missing: Collection[str] = ()) -> list[Any]:
    """The names, as parameters of a test; those that `make test` leaves out are long.

    Args:
        missing: recipes that the installed release of the engine does not build on a CPU.
    """
    sample = {*SAMPLE, f"{SAMPLE[1]} draft", *list(DRAWN)[:3]}
    return [
        pytest.param(name, marks=[] if name in sample else pytest.mark.long)
        for name in names()
        if name.removesuffix(" draft") not in missing
    ]


def run(engine: str, checkpoints: Checkpoints, folder: Path, asked: Collection[str]) -> dict[str, str]:
    """How each start that is ``asked`` for ended; of clean models the canary runs every layer."""
    tiny_checkpoints.RECIPES.update({name: model.recipe() for name, model in DRAWN.items()})
    jobs = {
        name: {
            **suite.job(None, checkpoints.path(name.removesuffix(" draft")), name.endswith(" draft")),
            "verify": "all",
        }
        for name in names()
        if name in asked
    }
    return suite.run_all(engine, checkpoints, folder, jobs, asked)
