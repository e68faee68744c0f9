"""patches/<engine>.yaml is the truth about releases: docs/versions.md and the test matrix say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import versions_docs
import yaml
from packaging.version import Version

from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.engines import EngineFacts, facts_of, read_engine
from fse_patch.patches import ENGINES, FOLDER

ROOT = Path(__file__).parents[2]
NAMES = {"vLLM": "vllm", "SGLang": "sglang"}
FACTS = {engine: facts_of(engine) for engine in ENGINES}


def differences(facts: EngineFacts, page: str, matrix: list[tuple[str, str]]) -> list[str]:
    """What docs/versions.md and the matrix say otherwise of an engine's releases than its file."""
    cpu = {row.release for row in facts.releases if row.cpu}
    found = []
    built = {version for engine, version in matrix if engine == facts.engine}
    if built != cpu:
        found.append(f"matrix: {sorted(built ^ cpu)}")
    cells = re.findall(r"^\| (\w+) \| (\d[\d.]*) \| ([^|]*) \|", page, re.MULTILINE)
    told = {(release, where) for name, release, where in cells if NAMES[name] == facts.engine}
    known = {(r.release, ", ".join([*(["CPU"] if r.cpu else []), *r.cuda]) or "-") for r in facts.releases}
    return found + [f"page: {row}" for row in sorted(told ^ known)]


PAGE = (ROOT / "docs" / "versions.md").read_text()
MATRIX = [
    (row["engine"], str(row["version"]))
    for row in yaml.safe_load((ROOT / "ci/matrix.yaml").read_text())["engines"]
]


@pytest.mark.parametrize("engine", ENGINES)
def test_page_and_matrix_say_the_same(engine: str) -> None:
    assert differences(FACTS[engine], PAGE, MATRIX) == []


def test_the_page_is_fresh() -> None:
    """`python ci/versions_docs.py --write` makes it."""
    assert versions_docs.FILE.read_text(encoding="utf-8") == versions_docs.page()


def test_a_difference_is_seen() -> None:
    """The control: each of the three without one release."""
    vllm = FACTS["vllm"]
    fewer = vllm.model_copy(update={"releases": [r for r in vllm.releases if r.release != "0.32.0"]})
    assert len(differences(fewer, PAGE, MATRIX)) == 2
    assert differences(vllm, PAGE.replace("| 0.26.0 |", "| 0.27.0 |"), MATRIX) != []
    assert differences(vllm, PAGE.replace("| NVIDIA H200 |", "| NVIDIA H100 |"), MATRIX) != []
    assert differences(vllm, PAGE, MATRIX[1:]) == ["matrix: ['0.28.0']"]


@pytest.mark.parametrize("engine", ENGINES)
def test_each_release_stands_once_in_order_and_in_what_was_read(engine: str) -> None:
    facts = FACTS[engine]
    releases = [Version(row.release) for row in facts.releases]
    assert releases == sorted(set(releases))
    assert all(facts.standing(release) != "untested" for release in releases)
    assert list(facts.tested) == [row.release for row in facts.releases if row.cpu or row.cuda]
    assert set(facts.tested) < set(facts.listed)


@pytest.mark.parametrize(
    ("version", "standing"),
    [
        ("0.26.0", "tested"),
        ("0.32.0", "tested"),
        ("0.32.0+cpu", "tested"),
        ("0.33.0", "tested"),
        ("0.27.0", "read"),
        ("0.34.0", "untested"),
    ],
)
def test_what_a_release_is(version: str, standing: str) -> None:
    assert FACTS["vllm"].standing(Version(version)) == standing


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("release: 0.24.0", "release: newest", "releases.0.release: Invalid version: 'newest'"),
        ("cpu: true}", "cpu: 1}", "releases.6.cpu: Input should be a valid boolean"),
        ('read: ">=0.19,<0.34"', "read: all", "read: Invalid specifier: 'all'"),
        ("group: vllm", "grup: vllm", "plugins.grup: unknown key; did you mean group?"),
    ],
)
def test_a_malformed_record(tmp_path: Path, old: str, new: str, words: str) -> None:
    text = (FOLDER / "vllm.yaml").read_text()
    assert old in text
    path = tmp_path / "vllm.yaml"
    path.write_text(text.replace(old, new))
    with pytest.raises(FsePatchError) as caught:
        read_engine(path)
    assert str(caught.value) == f"{path}: {words}"
