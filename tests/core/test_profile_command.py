"""`fse-patch profile`: bad input is one line; an arm that fails says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fse_patch.errors import EngineError
from fse_patch.lab import profile

from .test_cli_plan import fse_patch

WINDOW = {"streams": 2, "warm_up": 3, "steps": 8, "looker": "torch"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--arm", "fused"), "--arm fused: use both, stock, ours"),
        (("--by", "nsys"), "--by nsys: use torch or outside"),
        (("--engine-args", "{"), "--engine-args"),
        ((), "there is no such folder"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    done = fse_patch("profile", str(tmp_path / "nowhere"), "--engine", "vllm", *words)
    assert done.returncode == 2
    assert said in done.stderr or not words
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_request_has_room_for_the_window(tmp_path: Path) -> None:
    asked = profile.ProfileJob(tmp_path, 256, WINDOW, {"dtype": "float32"}).request()
    assert len(asked["prompts"]) == 2
    assert asked["new_tokens"] > 3 + 8 + 2
    assert (asked["window"], asked["engine_args"]) == (WINDOW, {"dtype": "float32"})


def test_arms_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[Any] = []

    def run_process(engine: str, jobs: Any, fused: bool, *_: Any) -> Any:
        ran.append((engine, fused))
        return [{"workers": [{"steps": 8, "rows": [], "fused": fused}]}], "", "ended with status 0"

    monkeypatch.setattr(profile, "run_process", run_process)
    job = profile.ProfileJob(tmp_path, 256, WINDOW)
    found = profile.profile(job, "vllm", ("stock", "ours"), 60)
    assert ran == [("vllm", False), ("vllm", True)]
    assert [told["fused"] for told in found.values()] == [False, True]


@pytest.mark.parametrize(
    ("results", "said"), [([{"error": "FsePatchError: never opened"}], "never opened"), ([], "status 1")]
)
def test_an_arm_that_fails_is_an_error_with_its_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, results: list[Any], said: str
) -> None:
    monkeypatch.setattr(profile, "run_process", lambda *_: (results, "the log\n", "ended with status 1"))
    with pytest.raises(profile.ArmError) as error:
        profile.profile(profile.ProfileJob(tmp_path, 256, WINDOW), "vllm", ("ours",), 60)
    assert said in str(error.value)
    assert str(error.value).startswith("ours arm: ")
    assert error.value.log == "the log"
    assert error.value.exit_status == EngineError.exit_status == 4
