"""Checkpoints of public reports: fused and proved, or served as they are; never a stop in the load."""

from __future__ import annotations

import pytest

from ..reports import Report
from ..running import Case
from . import cases
from .conftest import Runs

pytestmark = pytest.mark.one_release


@pytest.mark.parametrize(("report", "case", "stock"), cases.REPORTS.parameters())
def test_it_is_served(runs: Runs, report: Report, case: Case, stock: Case) -> None:
    cases.REPORTS.check(runs, runs.float32, report, case, stock)
