"""The cache of measured thresholds: one file a situation, replaced in one step, no need of a disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import pytest

from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.forward.measured_cache import PairedSituation, keep, kept, load, remove

HERE = PairedSituation(
    device="NVIDIA H200",
    driver="570.1",
    engine="vllm",
    release="0.26.0",
    backend="triton",
    dtype="bfloat16",
    routed="bfloat16",
    shared="bfloat16",
    num_experts=512,
    top_k=10,
    hidden_size=2048,
    width=512,
    shared_width=512,
    scoring="softmax",
    gated=True,
    version="1",
)
BOUNDS = {"1 even": 1.8, "1 alike": 1.7}


def test_what_is_kept_is_found(tmp_path: Path) -> None:
    assert load(tmp_path, HERE) is None
    assert keep(tmp_path, HERE, 16, BOUNDS)
    found = load(tmp_path, HERE)
    assert found is not None
    assert (found.threshold, found.bounds) == (16, BOUNDS)
    assert "vllm 0.26.0 (triton) on NVIDIA H200" in found.words
    assert keep(tmp_path, HERE, 8, {})
    assert load(tmp_path, HERE).threshold == 8  # type: ignore[union-attr]
    assert list(kept(tmp_path)) == [HERE.name]


@pytest.mark.parametrize("name", [field.name for field in fields(PairedSituation)])
def test_another_situation_is_another_measurement(tmp_path: Path, name: str) -> None:
    keep(tmp_path, HERE, 16, {})
    value = getattr(HERE, name)
    other = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value + "x"
    assert load(tmp_path, replace(HERE, **{name: other})) is None
    assert load(tmp_path, HERE) is not None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"threshold": "16"}', "\udcff"])
def test_a_broken_file_counts_as_none(tmp_path: Path, text: str) -> None:
    keep(tmp_path, HERE, 16, {})
    file = tmp_path / "tuned" / f"{HERE.name}.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert load(tmp_path, HERE) is None
    assert kept(tmp_path) == {}
    assert keep(tmp_path, HERE, 4, {})
    assert load(tmp_path, HERE) is not None


def test_a_file_of_another_situation_under_this_name_counts_as_none(tmp_path: Path) -> None:
    keep(tmp_path, HERE, 16, {})
    file = tmp_path / "tuned" / f"{HERE.name}.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps(told | {"situation": told["situation"] | {"device": "other"}}))
    assert load(tmp_path, HERE) is None


def test_a_place_that_cannot_be_written_keeps_nothing_and_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "tuned").write_text("a file where a folder should be")
    assert not keep(tmp_path, HERE, 16, {})
    assert load(tmp_path, HERE) is None
    assert kept(tmp_path) == {}


def test_many_writers_leave_one_whole_file(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        done = list(
            pool.map(lambda n: keep(tmp_path, HERE, n, {str(i): 1.0 for i in range(500)}), range(1, 33))
        )
    assert all(done)
    found = load(tmp_path, HERE)
    assert found is not None
    assert len(found.bounds) == 500
    assert not list((tmp_path / "tuned").glob("*.part"))


def test_the_command_lists_shows_and_removes(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fse_patch.cli.app", "tuned", *arguments]
        env = {**os.environ, "FSE_PATCH_CACHE": str(tmp_path)}
        return subprocess.run(command, capture_output=True, text=True, env=env, check=False)

    keep(tmp_path, HERE, 16, BOUNDS)
    listed = json.loads(run("list", "--json").stdout)
    assert [(e["name"], e["threshold"]) for e in listed["entries"]] == [(HERE.name, 16)]
    assert HERE.name in run("list").stdout
    shown = json.loads(run("show", HERE.name, "--json").stdout)
    assert shown["bounds"] == BOUNDS
    for command in ("show", "remove"):
        missing = run(command, "nothing")
        assert (missing.returncode, missing.stdout) == (2, "")
        assert "nothing of that name is kept" in missing.stderr
        assert len(missing.stderr.splitlines()) == 1
    assert json.loads(run("remove", HERE.name, "--json").stdout) == {"removed": HERE.name}
    assert load(tmp_path, HERE) is None
    with pytest.raises(FsePatchError, match="nothing of that name"):
        remove(tmp_path, HERE.name)
