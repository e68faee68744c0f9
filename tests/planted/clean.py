"""Models with nothing wrong: every recipe of ci/checkpoints that fuses, and drawn ones."""

from __future__ import annotations

from pathlib import Path

import tiny_checkpoints

from ..running import Checkpoints
from . import drawn, suite

SAMPLE = ("glm4_moe_shared2_scale", "qwen3_next_mtp", "qwen3_5_vl_3d")
DRAWN = {model.name: model for model in map(drawn.draw, drawn.SEEDS)}
RECIPES = {name: recipe for name, recipe in tiny_checkpoints.RECIPES.items() if recipe.family}


def names(engine: str) -> list[str]:
    """Of the starts of this run; a draft has its checkpoint's name and more."""
    if not suite.WHOLE:
        return [*SAMPLE, f"{SAMPLE[1]} draft", *list(DRAWN)[:3]]
    drafts = [f"{name} draft" for name, recipe in RECIPES.items() if recipe.draft != "none"]
    return [*RECIPES, *drafts, *DRAWN]


def run(engine: str, checkpoints: Checkpoints, folder: Path) -> dict[str, str]:
    """How the start of each fault and of each clean model ended; of these the canary runs every layer."""
    tiny_checkpoints.RECIPES.update({name: model.recipe() for name, model in DRAWN.items()})
    jobs = {
        name: {
            **suite.job(None, checkpoints.path(name.removesuffix(" draft")), name.endswith(" draft")),
            "verify": "all",
        }
        for name in names(engine)
    }
    return suite.run_all(engine, checkpoints, folder, jobs)
