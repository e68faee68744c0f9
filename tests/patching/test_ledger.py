"""A malformed ledger is one line that names file and field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from fse_patch.adapters.patching import ledger
from fse_patch.errors import FsePatchError

from .conftest import FACTS

ENTRY = {
    "id": "a",
    "target": "pkg.mod:Name",
    "versions": [">=1"],
    "factory": "mod:make",
    "why": "because",
    "upstream": "https://example.org/1",
    "remove_when": "fixed",
}
DATA = {
    "engine": "vllm",
    "import_name": "pkg",
    "distributions": ["pkg"],
    **FACTS,
    "patches": [ENTRY],
}


def load(folder: Path, data: object) -> ledger.Ledger:
    (folder / "vllm.yaml").write_text(yaml.safe_dump(data))
    return ledger.load("vllm", folder)


def test_reads(tmp_path: Path) -> None:
    hashes = {"pkg.mod:Name": {"1.0": "abc"}, "pkg.dep:f": {"1.0": "def"}}
    (tmp_path / "vllm.fingerprints.json").write_text(json.dumps(hashes))
    book = load(tmp_path, {**DATA, "patches": [{**ENTRY, "relies_on": ["pkg.dep:f"]}]})
    (patch,) = book.patches
    assert (patch.module, patch.qualname, patch.imported) == ("pkg.mod", "Name", False)
    assert patch.source.fingerprints == {"1.0": "abc"}
    assert patch.relies_on[0].fingerprints == {"1.0": "def"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"target": "pkg.mod.Name"}, "patches.0.target"),
        ({"factory": "make"}, "patches.0.factory"),
        ({"versions": ["one"]}, "patches.0.versions.0"),
        ({"versions": []}, "patches.0.versions"),
        ({"upstream": "none"}, "patches.0.upstream"),
        ({"why": ""}, "patches.0.why"),
        ({"surprise": 1}, "patches.0.surprise"),
        ({"remove_when": None}, "patches.0.remove_when"),
        ({"setting": "FSE_PATCH_NONE"}, "patches.0.setting"),
    ],
)
def test_bad_field(tmp_path: Path, change: dict[str, object], named: str) -> None:
    with pytest.raises(FsePatchError) as caught:
        load(tmp_path, {**DATA, "patches": [{**ENTRY, **change}]})
    assert str(tmp_path / "vllm.yaml") in str(caught.value)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_id_twice(tmp_path: Path) -> None:
    with pytest.raises(FsePatchError, match="'a' occurs twice"):
        load(tmp_path, {**DATA, "patches": [ENTRY, ENTRY]})


@pytest.mark.parametrize("text", ["", "[", "a: b: c", "- 1", "\x00"])
def test_not_a_ledger(tmp_path: Path, text: str) -> None:
    (tmp_path / "vllm.yaml").write_text(text)
    with pytest.raises(FsePatchError, match=r"vllm\.yaml") as caught:
        ledger.load("vllm", tmp_path)
    assert "\n" not in str(caught.value)


def test_malformed_fingerprints(tmp_path: Path) -> None:
    (tmp_path / "vllm.fingerprints.json").write_text('{"a": 1}')
    with pytest.raises(FsePatchError, match=r"vllm\.fingerprints\.json"):
        load(tmp_path, DATA)


def test_engine_without_patches(tmp_path: Path) -> None:
    with pytest.raises(FsePatchError, match="no patches"):
        ledger.load("sglang", tmp_path)
