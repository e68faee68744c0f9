"""Figures of blocks in README and docs/how-fast.md are those measured, in the mode that a table has."""

from __future__ import annotations

import re

import pytest

from fse_patch.fusion_core.forward.plan import ModePlan
from fse_patch.fusion_core.forward.tuned import read_table

from .test_tuned_files import FILES, FP8, NATIVE, PLAIN, ROOT, SGLANG, measured, shape_of

# By the words before the figures of a row: the table, and the shape.
ROWS = {
    "MoE block of Qwen3-Next-80B, bfloat16": (PLAIN, "qwen3_next_80b"),
    "of Qwen3.5-35B": (PLAIN, "qwen3.5_35b"),
    "of Qwen3.5-397B, cut in 8": (PLAIN, "qwen3.5_397b_tp8"),
    "of GLM-4.5-Air": (PLAIN, "glm4.5_air"),
    "of GLM-4.5-Air, cut in 2": (PLAIN, "glm4.5_air_tp2"),
    "Qwen3-Next-80B, FP8 with blocks": (FP8, "qwen3_next_80b"),
    "Qwen3.5-35B, FP8 with blocks": (FP8, "qwen3.5_35b"),
    "Qwen3.5-397B, cut in 8, FP8 with blocks": (FP8, "qwen3.5_397b_tp8"),
    "GLM-4.5-Air, FP8 with blocks": (FP8, "glm4.5_air"),
    "SGLang: Qwen3.5-35B, bfloat16": (SGLANG, "qwen3.5_35b"),
    "SGLang: Qwen3-Next-80B over its own fusion": (NATIVE, "qwen3_next_80b"),
    "SGLang: GLM-4.5-Air over its own fusion": (NATIVE, "glm4.5_air"),
}
LOWEST = {
    "vLLM 0.26.0, Qwen3-Next-80B": (PLAIN, "qwen3_next_80b"),
    "vLLM 0.26.0, GLM-4.5-Air": (PLAIN, "glm4.5_air"),
    "SGLang 0.5.17, Qwen3.5-35B": (SGLANG, "qwen3.5_35b"),
}
FEW = (1, 2, 4, 8, 16)
# A figure has two digits behind the point.
ROUNDED = 0.0051


def ratios(file: str, shape: str) -> dict[int, list[float]]:
    """By tokens: stock over the table's mode under each routing."""
    (row,) = [row for row in read_table(ROOT / file).rows if shape_of(row) == shape]
    plan = ModePlan(tuple((step.up_to, step.mode) for step in row.steps), row.otherwise, file)
    seen: dict[int, list[float]] = {}
    for found in measured(FILES[file], shape):
        seen.setdefault(found["tokens"], []).append(float(found[f"{plan.mode_of(found['tokens'])}_ratio"]))
    return seen


def cells(page: str, label: str) -> list[list[float]]:
    """Figures of the one row of a page with this label, cell by cell: one, or the lowest and the highest."""
    (line,) = re.findall(rf"^\| {re.escape(label)} \|(.*)\|$", (ROOT / page).read_text(), re.MULTILINE)
    return [[float(figure) for figure in re.findall(r"\d\.\d\d", cell)] for cell in line.split("|")]


def columns(seen: dict[int, list[float]]) -> list[list[float]]:
    """Ratios of each column: of few tokens by their number, and of all from 64 on."""
    many = [ratio for tokens, some in seen.items() if tokens >= 64 for ratio in some]
    return [*(seen[tokens] for tokens in FEW), many]


def wrong(told: list[list[float]], seen: list[list[float]], lowest: bool) -> list[str]:
    """Name the columns of which a row says something else."""
    ends = [[min(some)] if lowest else [min(some), max(some)] for some in seen]
    return [
        f"column {number}: {figures}, measured {right}"
        for number, (figures, right) in enumerate(zip(told, ends, strict=True))
        if abs(figures[0] - right[0]) > ROUNDED or abs(figures[-1] - right[-1]) > ROUNDED
    ]


@pytest.mark.parametrize("label", ROWS)
def test_how_fast(label: str) -> None:
    seen, told = columns(ratios(*ROWS[label])), cells("docs/how-fast.md", label)
    assert wrong(told, seen, lowest=False) == []
    # The control: the highest figure is of another measurement.
    told[3][-1] += 0.02
    assert len(wrong(told, seen, lowest=False)) == 1


@pytest.mark.parametrize("label", LOWEST)
def test_readme(label: str) -> None:
    seen = columns(ratios(*LOWEST[label]))
    told = cells("README.md", label)[: len(seen)]
    assert wrong(told, seen, lowest=True) == []
    # The control: a figure of another measurement.
    told[1] = [told[1][0] + 0.02]
    assert len(wrong(told, seen, lowest=True)) == 1
