"""docs/refusals.md and the policy's schema list exactly the codes that there are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

from fse_patch import patches
from fse_patch.fusion_core.decision.policy import schema_text
from fse_patch.fusion_core.reasons import FUSES, REASONS, Code


def test_every_code_is_documented_and_no_other() -> None:
    text = (Path(__file__).parents[2] / "docs" / "refusals.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    documented = {code for row in rows for code in re.findall(r"`([a-z_.0-9]+)`", row.split("|")[1])}
    assert documented == set(REASONS) - {FUSES}


def test_the_schema_file_is_fresh() -> None:
    stored = Path(patches.__file__).with_name("policy.schema.json").read_text()
    assert stored == schema_text(), (
        "run: python -m fse_patch.fusion_core.decision.policy > patches/policy.schema.json"
    )
    assert json.loads(stored)["additionalProperties"] is False


def test_every_reason_has_a_meaning() -> None:
    assert set(REASONS) == set(get_args(Code))
