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
    """How each start ended: empty if the model would be served, fused. The canary runs every layer."""
    tiny_checkpoints.RECIPES.update({name: model.recipe() for name, model in DRAWN.items()})
    wanted = names(engine)
    jobs = [suite.job(None, checkpoints.path(n.removesuffix(" draft")), n.endswith(" draft")) for n in wanted]
    starts = suite.run(engine, jobs, folder, FSE_PATCH_VERIFY="all")
    return {name: start.outcome for name, start in zip(wanted, starts, strict=True)}
