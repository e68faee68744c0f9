"""What the tests of both engines say of LoRA adapters beside layers of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fse_patch.fusion_core.proof.compare import difference

from . import lora_adapter
from .running import Case, Runs

LIMIT = 5e-6
KINDS = ("attention", "routed", "shared")


def case_of(runs: Runs, recipe: str, folder: Path, declares: tuple[str, ...] = ()) -> Case:
    """A case with a real adapter of each kind, by its folder; ``declares`` as of `lora_adapter.make`."""
    checkpoint = runs.checkpoints.path(recipe)
    adapters = {kind: str(lora_adapter.make(checkpoint, folder / kind, kind, declares)) for kind in KINDS}
    return Case(recipe, engine_args={"adapters": adapters})


def check_attention(
    stock: dict[str, Any],
    ours: dict[str, Any],
    layout: str,
    answers: tuple[str, ...] = ("plain", "adapted"),
) -> None:
    """Layers of ours answer as in stock, without an adapter of the attention and with one."""
    for arm in (stock, ours):
        assert "error" not in arm, f"{arm['error']}\n{arm['log']}"
    (role,) = ours["workers"][0]["roles"]
    assert role.get("weight_layout", "merged") == layout
    assert set(role["calls_by_mode"]) == {"fused" if layout == "merged" else "paired"}
    for asked in answers:
        assert 0 < difference(stock[asked], ours[asked]).mean <= LIMIT, asked
    # The control: the adapter changes answers.
    assert difference(stock["plain"], stock["adapted"]).mean > 1000 * LIMIT


def check(stock: dict[str, Any], ours: dict[str, Any], layout: str) -> None:
    """Adapters of the attention answer as in stock; others are refused when they arrive."""
    check_attention(stock, ours, layout, ("plain", "adapted", "after"))
    # The control: stock takes them without a word.
    assert set(stock["said"].values()) == {""}
    for kind in ("routed", "shared"):
        assert f"LoRA adapter '{kind}' changes " in ours["said"][kind]
        assert "give an adapter of the attention alone" in ours["said"][kind]
