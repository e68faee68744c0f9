"""Pages that are made from code say what the code says."""

from __future__ import annotations

import dataclasses

import layers
import pytest
import refusals_docs

CONTRACTS = layers.ROOT / "pyproject.toml"


def test_refusals_are_those_of_the_table() -> None:
    assert refusals_docs.FILE.read_text(encoding="utf-8") == refusals_docs.page(), (
        "run: .venvs/core/bin/python ci/refusals_docs.py --write"
    )


def test_another_meaning_makes_another_page(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "quant.mixed"
    changed = dataclasses.replace(refusals_docs.REASONS[code], text="something else")
    monkeypatch.setattr(refusals_docs, "REASONS", {**refusals_docs.REASONS, code: changed})
    assert f"| `{code}` | something else |" in refusals_docs.page()


def test_the_picture_is_that_of_the_contracts() -> None:
    page = layers.PAGE.read_text(encoding="utf-8")
    assert page == layers.page(page, CONTRACTS.read_text(encoding="utf-8")), (
        "run: .venvs/core/bin/python ci/layers.py --write"
    )


def test_another_contract_makes_another_picture() -> None:
    page, text = layers.PAGE.read_text(encoding="utf-8"), CONTRACTS.read_text(encoding="utf-8")
    assert layers.page(page, text.replace('"session",\n    "child_env', '"child_env')) != page
    with pytest.raises(SystemExit, match="has no line"):
        layers.page("# no marks", text)
