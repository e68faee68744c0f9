"""The scripts of benchmarks/ that say what was measured, on arms that take known times."""

from __future__ import annotations

import csv
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
ARM = """
import json, os, sys
name, folder, _, out = sys.argv[1:5]
if len(sys.argv) > 5 and name == sys.argv[5]:
    sys.exit("broken")
assert os.environ["FSE_PATCH"] == {"stock": "0", "fused": "vllm"}[name]
ms = {"1": {"stock": 3.0, "fused": 2.0}[name], "64": 5.0}
steps = {streams: {"ms": value} for streams, value in ms.items()}
json.dump({"arm": name, "versions": {"vllm": "0"}, "steps": steps}, open(out, "w"))
"""


def alternate(tmp_path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "arm.py").write_text(ARM)
    files = ["--raw", str(tmp_path / "raw.json"), "--csv", str(tmp_path / "out.csv")]
    script = ["--script", str(tmp_path / "arm.py")]
    return subprocess.run(
        [sys.executable, str(FOLDER / "alternate.py"), str(tmp_path), *script, *files, *more],
        capture_output=True,
        text=True,
        check=False,
    )


def test_arms_in_turn(tmp_path: Path) -> None:
    assert alternate(tmp_path, "--rounds", "1").returncode == 0
    # A second call goes on: what was measured is kept.
    done = alternate(tmp_path, "--rounds", "3")
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "raw.json").read_text())
    order = ["stock", "fused", "fused", "stock", "stock", "fused"]
    assert [run["arm"] for run in runs] == order
    with (tmp_path / "out.csv").open(newline="") as file:
        one, many = csv.DictReader(file)
    assert (one["streams"], one["rounds"], one["ratio"], one["lower"], one["again"]) == (
        "1", "3", "1.5", "1.5", "1.0",
    )  # fmt: skip
    assert (many["streams"], many["ratio"], many["vllm"]) == ("64", "1.0", "0")


@pytest.mark.parametrize("arm", ["stock", "fused"])
def test_an_arm_that_fails_ends_the_run(tmp_path: Path, arm: str) -> None:
    done = alternate(tmp_path, "--rounds", "2", "--", arm)
    assert done.returncode == 1
    assert f"{arm} 0: status 1" in done.stderr
    assert "broken" in done.stderr
    assert not (tmp_path / "out.csv").exists()


def test_milliseconds_a_step_are_a_slope(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    decode = importlib.import_module("decode")
    now = [0.0]
    monkeypatch.setattr(decode.time, "perf_counter", lambda: now[0])
    calls: list[tuple[int, int]] = []

    def generate(prompts: list[list[int]], length: int) -> list[int]:
        # Prefill takes 7 s, a step 2 ms for each stream; the first call of a kind a second more.
        calls.append((len(prompts), length))
        now[0] += 7.0 + 0.002 * len(prompts) * length + (calls.count(calls[-1]) == 1)
        return [prompt[0] % 3 for prompt in prompts]

    found: dict[int, Any] = decode.steps("stock", generate, 1000, 2)
    assert list(found) == list(decode.STREAMS)
    assert {streams: round(step["ms"], 6) for streams, step in found.items()} == {
        streams: 2.0 * streams for streams in decode.STREAMS
    }
    assert found[1]["different_tokens"] == 1
    assert found[64]["different_tokens"] == 3


def test_both_arms_draw_the_same_weights() -> None:
    import torch

    sys.path.insert(0, str(FOLDER))
    try:
        decode = importlib.import_module("decode")
    finally:
        sys.path.remove(str(FOLDER))

    def model(first: str) -> torch.nn.Module:
        made = torch.nn.Module()
        for name in (first, "shared"):
            made.add_module(name, torch.nn.Linear(8, 4))
        made.gate = torch.nn.Linear(8, 4)
        return made

    one, other = model("a"), model("b")
    plain = one.get_parameter("a.weight").clone()
    for built in (one, other):
        decode.spread(built)
    assert torch.equal(one.get_parameter("gate.weight"), other.get_parameter("gate.weight"))
    assert torch.equal(one.get_parameter("a.weight"), plain)
    assert not torch.equal(one.get_parameter("shared.weight"), other.get_parameter("shared.weight"))
