"""Checkpoints of public reports: fused and proved, or served as they are; never a stop in the load."""

from __future__ import annotations

import pytest

from ..reports import Report, check_laid_out
from ..running import Case
from . import cases
from .conftest import Runs

pytestmark = pytest.mark.one_release


@pytest.mark.parametrize(("report", "case", "stock"), cases.REPORTS.parameters())
def test_it_is_served(runs: Runs, report: Report, case: Case, stock: Case) -> None:
    cases.REPORTS.check(runs, runs.float32, report, case, stock)


@pytest.mark.long
@pytest.mark.parametrize("case", cases.LAID_OUT, ids=lambda case: case.recipe)
def test_files_as_they_lie_about(runs: Runs, case: Case) -> None:
    pair = runs.float32
    print(case.recipe, check_laid_out("sglang", pair.stock[case.name], pair.fused[case.name]))
