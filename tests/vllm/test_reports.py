"""Checkpoints of public reports: fused and proved, or served as they are; never a stop in the load."""

from __future__ import annotations

import pytest

from fse_patch.patches import ENGINES

from ..reports import REPORTS, Report, decided
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
