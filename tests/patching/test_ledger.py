"""A malformed ledger is one line that names file and field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

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


GROUPS = {
    "both": ["pkg.dep:f", {"name": "pkg.dep:g", "versions": "<2"}],
    "late": [{"name": "pkg.dep:h", "versions": ">=1.5"}],
}


@pytest.mark.parametrize(
    ("relies_on", "by_release"),
    [
        (["both"], {"1.0": "fg", "1.5": "fg", "2.0": "f", "2.0+cpu": "f"}),
        (["late", "pkg.dep:f"], {"1.0": "f", "1.5": "hf", "2.0": "hf"}),
        ([{"name": "pkg.dep:f", "versions": ">1"}], {"1.0": "", "1.5": "f"}),
        # A group, for some releases: both have to hold.
        ([{"name": "both", "versions": ">=1.5"}], {"1.0": "", "1.5": "fg", "2.0": "f"}),
        ([{"name": "late", "versions": "<2"}], {"1.0": "", "1.5": "h", "2.0": ""}),
    ],
)
def test_what_is_relied_on_in_some_releases(
    tmp_path: Path, relies_on: list[object], by_release: dict[str, str]
) -> None:
    book = load(tmp_path, {**DATA, "groups": GROUPS, "patches": [{**ENTRY, "relies_on": relies_on}]})
    for release, names in by_release.items():
        (patch,) = book.patches_for(Version(release))
        assert "".join(s.reference[-1] for s in patch.relies_on) == names, release
    assert book.patches_for(Version("0.9")) == ()


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"name": "pkg.dep:f", "versions": "one"}, "versions: Invalid specifier"),
        ({"name": "pkg.dep:f", "version": "<2"}, "version: unknown key; did you mean "),
        ({"versions": "<2"}, "name: Field required"),
        (5, "should be an object with keys of name, versions"),
    ],
)
@pytest.mark.parametrize("place", ["groups.g.0", "patches.0.relies_on.0"])
def test_bad_row(tmp_path: Path, place: str, row: object, named: str) -> None:
    entry = {**ENTRY, "relies_on": [row]} if "patches" in place else ENTRY
    groups = {"g": [row]} if "groups" in place else {}
    with pytest.raises(FsePatchError) as caught:
        load(tmp_path, {**DATA, "groups": groups, "patches": [entry]})
    assert str(caught.value).startswith(f"{tmp_path / 'vllm.yaml'}: {place}")
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_row_of_a_group_is_a_reference(tmp_path: Path) -> None:
    with pytest.raises(FsePatchError, match=r"groups\.g\.0\.name: 'both': write it as"):
        load(tmp_path, {**DATA, "groups": {"g": ["both"]}})


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
