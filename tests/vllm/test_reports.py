"""Checkpoints of public reports: fused and proved, or served as they are; never a stop in the load."""

from __future__ import annotations

import pytest

from fse_patch.patches import ENGINES

from ..reports import REPORTS, Report, check_laid_out, decided
from . import cases
from .conftest import Runs
from .engine import Case, Checkpoints

pytestmark = pytest.mark.one_release


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.recipe)
def test_the_decision(checkpoints: Checkpoints, report: Report, engine: str) -> None:
    folder = checkpoints.path(report.recipe)
    assert decided(folder, engine, report.arguments.get("load_format", "auto")) == report.code(engine)


@pytest.mark.parametrize(("report", "case", "stock"), cases.REPORTS.parameters())
def test_it_is_served(runs: Runs, report: Report, case: Case, stock: Case) -> None:
    cases.REPORTS.check(runs, runs.float32, report, case, stock)


@pytest.mark.long
@pytest.mark.parametrize("case", cases.LAID_OUT, ids=lambda case: case.recipe)
def test_files_as_they_lie_about(runs: Runs, case: Case) -> None:
    pair = runs.float32
    print(case.recipe, check_laid_out("vllm", pair.stock[case.name], pair.fused[case.name]))
