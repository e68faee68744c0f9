"""patches/<engine>.yaml is the truth about releases: the README's table and the test matrix say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.engines import EngineFacts, facts_of, read_engine
from fse_patch.patches import ENGINES, FOLDER

ROOT = Path(__file__).parents[2]
NAMES = {"vLLM": "vllm", "SGLang": "sglang"}
FACTS = {engine: facts_of(engine) for engine in ENGINES}


def readme_rows(text: str) -> list[tuple[str, list[str], str]]:
    """Engine, releases and devices of each row of the README's table that names releases."""
    cells = re.findall(r"^\| (\w+) \| ([^|]*) \| ([^|]*) \|", text, re.MULTILINE)
    rows = [(NAMES[a], re.findall(r"\d+(?:\.\d+)+", b), c) for a, b, c in cells if a in NAMES]
    return [row for row in rows if row[1]]


def differences(facts: EngineFacts, readme: str, matrix: list[tuple[str, str]]) -> list[str]:
    """What README and matrix say otherwise of an engine's releases than its file."""
    cpu = {row.release for row in facts.releases if row.cpu}
    found = []
    built = {version for engine, version in matrix if engine == facts.engine}
    if built != cpu:
        found.append(f"matrix: {sorted(built ^ cpu)}")
    rows = [
        (releases, devices) for engine, releases, devices in readme_rows(readme) if engine == facts.engine
    ]
    if {r for releases, devices in rows if devices == "CPU" for r in releases} != cpu:
        found.append("README: CPU")
    told = {(r, devices) for releases, devices in rows if devices.startswith("CUDA") for r in releases}
    known = {(row.release, name) for row in facts.releases for name in row.cuda}
    if {release for release, _ in told} != {release for release, _ in known}:
        found.append("README: CUDA")
    for release, name in known:
        if not any(r == release and name.removeprefix("NVIDIA ") in devices for r, devices in told):
            found.append(f"README: {release} on {name}")
    return found


README = (ROOT / "README.md").read_text()
MATRIX = [
    (row["engine"], str(row["version"]))
    for row in yaml.safe_load((ROOT / "ci/matrix.yaml").read_text())["engines"]
]


@pytest.mark.parametrize("engine", ENGINES)
def test_readme_and_matrix_say_the_same(engine: str) -> None:
    assert differences(FACTS[engine], README, MATRIX) == []


def test_a_difference_is_seen() -> None:
    """The control: each of the three without one release."""
    vllm = FACTS["vllm"]
    fewer = vllm.model_copy(update={"releases": vllm.releases[:-1]})
    assert len(differences(fewer, README, MATRIX)) == 2
    assert differences(vllm, README.replace("| 0.26.0 |", "| 0.27.0 |"), MATRIX) != []
    assert differences(vllm, README.replace("CUDA: one H200", "CUDA: one H100"), MATRIX) != []
    assert differences(vllm, README, MATRIX[1:]) == ["matrix: ['0.28.0']"]


@pytest.mark.parametrize("engine", ENGINES)
def test_each_release_stands_once_and_something_ran_in_it(engine: str) -> None:
    releases = [row.release for row in FACTS[engine].releases]
    assert len(releases) == len(set(releases))
    assert list(FACTS[engine].tested) == releases


@pytest.mark.parametrize(
    ("version", "standing"),
    [
        ("0.26.0", "tested"),
        ("0.32.0", "tested"),
        ("0.32.0+cpu", "tested"),
        ("0.33.0", "read"),
        ("0.34.0", "untested"),
    ],
)
def test_what_a_release_is(version: str, standing: str) -> None:
    assert FACTS["vllm"].standing(Version(version)) == standing


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("release: 0.26.0", "release: newest", "releases.0.release: Invalid version: 'newest'"),
        ("cpu: true}", "cpu: 1}", "releases.1.cpu: Input should be a valid boolean"),
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
