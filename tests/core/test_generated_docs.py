"""Pages that are made from code say what the code says."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import layers
import pytest
import refusals_docs
import releases_docs

from fse_patch.adapters.patching import ledger
from fse_patch.fusion_core.engines import facts_of
from fse_patch.patches import ENGINES, FOLDER

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


def test_releases_are_those_of_the_ledgers() -> None:
    assert releases_docs.FILE.read_text(encoding="utf-8") == releases_docs.page(releases_docs.found()), (
        "run: .venvs/core/bin/python ci/releases_docs.py --write"
    )


def test_every_listed_release_was_read_and_the_newest_looked_up() -> None:
    found = releases_docs.found()
    for engine in ENGINES:
        assert list(found[engine]["tables"]) == list(facts_of(engine).listed)
        assert found[engine]["newest"]


def test_another_fingerprint_or_row_makes_another_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, before = releases_docs.found(), releases_docs.page(releases_docs.found())
    data = Path(shutil.copytree(FOLDER, tmp_path / "patches"))
    monkeypatch.setattr(ledger, "FOLDER", data)
    hashes = json.loads((data / "vllm.fingerprints.json").read_text())
    next(iter(hashes.values()))["0.33.0"] = "another"
    (data / "vllm.fingerprints.json").write_text(json.dumps(hashes))
    other = releases_docs.page(found)
    assert other != before
    (data / "sglang.yaml").write_text(
        (data / "sglang.yaml").read_text().replace("  - {release: 0.5.21}\n", "")
    )
    assert "| 0.5.21 |" in other
    assert "| 0.5.21 |" not in releases_docs.page(found)


def test_a_release_that_needs_a_patch_no_more_is_named() -> None:
    book = ledger.load("vllm")
    patch = next(p for p in book.patches if p.unneeded == "tables")
    assert releases_docs.needed(book, patch, "0.33.0", {"0.33.0": [3, 4]})
    assert not releases_docs.needed(book, patch, "0.33.0", {"0.33.0": [4, 4]})
    assert releases_docs.needed(book, patch, "0.33.0", {})
    block = next(p for p in book.patches if p.unneeded == "native")
    assert releases_docs.needed(book, block, "0.33.0", {})


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
