"""ci/fingerprint.py: regenerate, check, keep what it was not given."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from .conftest import Toy

SCRIPT = Path(__file__).parents[2] / "ci" / "fingerprint.py"


@pytest.fixture
def installed(toy: Toy) -> Toy:
    toy.write("core.py", "def greet():\n    return 'hello'\n")
    toy.install()
    toy.ledger("core:greet")
    return toy


def run(toy: Toy, *arguments: str) -> subprocess.CompletedProcess[str]:
    folder = str(toy.root / "ledger")
    command = [
        sys.executable,
        str(SCRIPT),
        "--engine",
        "vllm",
        "--patches",
        folder,
        "--site-packages",
        str(toy.root),
    ]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60)


def stored(toy: Toy) -> dict[str, dict[str, str]]:
    return json.loads((toy.root / "ledger" / "vllm.fingerprints.json").read_text())  # type: ignore[no-any-return]


def test_write_then_up_to_date_then_stale(installed: Toy) -> None:
    assert run(installed, "--write").returncode == 0
    assert run(installed).returncode == 0
    installed.write("core.py", "def greet():\n    return 'hallo'\n")
    stale = run(installed)
    assert stale.returncode == 1
    assert "--write" in stale.stderr


def test_other_releases_stay_and_unnamed_sources_go(installed: Toy) -> None:
    path = installed.root / "ledger" / "vllm.fingerprints.json"
    name = f"{installed.name}.core:greet"
    mine = stored(installed)[name]["1.0"]
    path.write_text(json.dumps({name: {"0.9": "old", "1.0": "wrong"}, "gone:gone": {"1.0": "x"}}))
    assert run(installed, "--write").returncode == 0
    assert stored(installed) == {name: {"0.9": "old", "1.0": mine}}


def test_source_of_another_release_is_not_looked_for(installed: Toy) -> None:
    path = installed.root / "ledger" / "vllm.yaml"
    data = yaml.safe_load(path.read_text())
    gone = f"{installed.name}.core:gone"
    data["patches"][0]["relies_on"] = [{"name": gone, "versions": "<1.0"}]
    path.write_text(yaml.safe_dump(data))
    assert run(installed, "--write").returncode == 0
    assert stored(installed)[gone] == {}
    data["patches"][0]["relies_on"] = [gone]
    path.write_text(yaml.safe_dump(data))
    assert "core:gone: not defined" in run(installed).stderr


def test_source_that_is_not_there(installed: Toy) -> None:
    installed.write("core.py", "")
    failed = run(installed, "--write")
    assert failed.returncode == 2
    assert "core:greet: not defined" in failed.stderr
