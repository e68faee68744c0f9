"""docs/refusals.md lists exactly the codes that there are."""

from __future__ import annotations

import re
from pathlib import Path

from fse_patch.fusion_core.decision import FUSES
from fse_patch.fusion_core.reasons import REASONS


def test_every_code_is_documented_and_no_other() -> None:
    text = (Path(__file__).parents[2] / "docs" / "refusals.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    documented = {code for row in rows for code in re.findall(r"`([a-z_.0-9]+)`", row.split("|")[1])}
    assert documented == set(REASONS) - {FUSES}
