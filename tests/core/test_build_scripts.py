"""The scripts that build environments and run tests: what can be checked without building anything."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import envs
import testing


def test_matrix_names_say_engine_and_version():
    rows = envs.matrix()["engines"]
    assert rows
    for row in rows:
        assert row["name"] == f"{row['engine']}-{row['version']}"
        assert re.fullmatch(r"\d+\.\d+\.\d+", str(row["version"]))


def test_a_step_that_hangs_is_ended_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(testing, "LOGS", tmp_path)
    monkeypatch.setattr(testing, "HEARTBEAT", 0.2)
    code = "import subprocess,sys;p=subprocess.Popen(['sleep','60']);print(p.pid,flush=True);p.wait()"
    begun = time.monotonic()
    result = testing.run(testing.Step("hangs", [sys.executable, "-c", code], limit=1))
    assert result.status == 124
    assert "limit of 1 s" in result.closing
    assert time.monotonic() - begun < 15
    child = Path("/proc", (tmp_path / "hangs.log").read_text().split()[0], "cmdline")
    assert not child.exists() or not child.read_bytes()  # gone, or dead and waiting to be reaped


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
