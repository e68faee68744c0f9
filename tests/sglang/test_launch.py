"""The launch wrapper: SGLang's own arguments and answers, with the model fused; and what it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from fse_patch.lab import verify
from fse_patch.lab.sglang.verify_arm import CPU_DEFAULTS, DEFAULTS, free_port

from ..running import ROOT, VOCAB, Case
from .conftest import Runs

WRAPPER, STOCK = "fse_patch.launch_sglang", "sglang.launch_server"
SERVED = [Case("glm4_moe_scale")]
LIMIT = 300.0


def arguments(checkpoint: Path) -> list[str]:
    """The server arguments that the arms of a verification give to the engine."""
    given = {**DEFAULTS, **CPU_DEFAULTS, "model_path": str(checkpoint), "dtype": "float32"}
    flags = [f"--{k.replace('_', '-')}" + ("" if v is True else f"={v}") for k, v in given.items()]
    return [*flags, "--skip-server-warmup"]


def start(module: str, args: list[str], log: Path, **env: str) -> subprocess.Popen[bytes]:
    with log.open("wb") as sink:
        return subprocess.Popen(
            [sys.executable, "-m", module, *args],
            env={**{k: v for k, v in os.environ.items() if not k.startswith("FSE_PATCH")}, **env},
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def post(port: int, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@contextmanager
def server(args: list[str], log: Path, **env: str) -> Iterator[tuple[int, int]]:
    """A server that answers; its port and process id."""
    port = free_port()
    process = start(WRAPPER, [*args, f"--port={port}", f"--nccl-port={free_port()}"], log, **env)
    try:
        end_of_wait = time.monotonic() + LIMIT
        while True:
            assert process.poll() is None, log.read_text(errors="replace")[-4000:]
            assert time.monotonic() < end_of_wait, log.read_text(errors="replace")[-4000:]
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            time.sleep(0.5)
        yield port, process.pid
    finally:
        end(process)


def ended(module: str, args: list[str], log: Path, **env: str) -> tuple[int, str]:
    """Exit status and log of a server that must not come up."""
    process = start(module, args, log, **env)
    try:
        status = process.wait(LIMIT)
    finally:
        end(process)
    return status, log.read_text(errors="replace")


def prompt_logprobs(port: int) -> list[list[float]]:
    body = {
        "input_ids": verify.prompts(VOCAB),
        "sampling_params": {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    return [[v for v, *_ in out["meta_info"]["input_token_logprobs"][1:]] for out in post(port, body)]


@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_served_equals_the_engine(runs: Runs, tmp_path: Path, case: Case) -> None:
    log = tmp_path / "log"
    # Without SGLang's plugins, as in releases that have none.
    with server(arguments(runs.checkpoints.path(case.recipe)), log, SGLANG_PLUGINS="none") as (port, pid):
        served = prompt_logprobs(port)
    patched = re.findall(r"\[fse_patch (\d+)\] sglang, main model: shared expert fused", log.read_text())
    assert len(patched) == 1
    assert int(patched[0]) != pid  # the scheduler's process
    fused, stock = runs.float32.fused[case.name]["logprobs"], runs.float32.stock[case.name]["logprobs"]
    assert served == fused
    assert served != stock  # the control: stock's differ in the last bits


CONTRADICTIONS = {
    "lora": ["--enable-lora", "--max-lora-rank=8", "--lora-target-modules=down_proj"],
    "backend.topk_format": ["--moe-runner-backend=triton_kernel"],
}
READ, UNFUSED = "loading shards: 100%", "not fused: parallel.ep"
EXPERT_PARALLEL = ["--tp-size=2", "--ep-size=2"]


@pytest.mark.one_release
@pytest.mark.parametrize("reason", ["lora", pytest.param("backend.topk_format", marks=pytest.mark.long)])
def test_contradicting_arguments_stop_a_strict_server(runs: Runs, tmp_path: Path, reason: str) -> None:
    args = [*arguments(runs.checkpoints.path("qwen2_moe_wide4")), *CONTRADICTIONS[reason]]
    status, log = ended(WRAPPER, args, tmp_path / "log", FSE_PATCH_STRICT="1")
    assert status != 0
    assert f"fse_patch: sglang: {reason}: " in log
    assert "loading shards" not in log


@pytest.mark.long
@pytest.mark.one_release
def test_contradicting_arguments_go_on_unfused(runs: Runs, tmp_path: Path) -> None:
    """The control of the test above. With none of these does stock SGLang answer a request on a CPU."""
    log = tmp_path / "log"
    args = [*arguments(runs.checkpoints.path("qwen2_moe_wide4")), *EXPERT_PARALLEL]
    process = start(WRAPPER, args, log, SGLANG_CPU_OMP_THREADS_BIND="0|1")
    try:
        end_of_wait = time.monotonic() + LIMIT
        while READ not in (text := log.read_text(errors="replace")) or text.count(UNFUSED) < 2:
            assert process.poll() is None, text[-4000:]
            assert time.monotonic() < end_of_wait, text[-4000:]
            time.sleep(0.5)
    finally:
        end(process)
    assert text.count(UNFUSED) == 2  # a line in each of the two processes


@pytest.mark.one_release
@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_sglangs_own_switch_is_respected(runs: Runs, tmp_path: Path, case: Case) -> None:
    log = tmp_path / "log"
    args = [*arguments(runs.checkpoints.path(case.recipe)), "--disable-shared-experts-fusion"]
    with server(args, log, FSE_PATCH_STRICT="1") as (port, _):
        served = prompt_logprobs(port)
    assert log.read_text().count("not fused: disabled: --disable-shared-experts-fusion is given") == 1
    assert served == runs.float32.stock[case.name]["logprobs"]


@pytest.mark.every_release
def test_a_patch_that_fails_in_a_child_stops_a_strict_server(runs: Runs, tmp_path: Path) -> None:
    """SGLang itself logs what a plugin raises, and serves."""
    args = arguments(runs.checkpoints.path("qwen2_moe"))
    env = {"PYTHONPATH": str(ROOT), "FSE_PATCH_STRICT": "1"}
    status, log = ended("tests.sglang.broken_child", args, tmp_path / "log", **env)
    assert status != 0
    assert re.search(
        "^fse_patch: patch initialize-model .*: a factory that fails in the child alone$", log, re.M
    )
    assert "loading shards" not in log


@pytest.mark.long
@pytest.mark.one_release
def test_the_help_text_is_sglangs() -> None:
    # Some choices are printed in the order of a set.
    env = {**os.environ, "PYTHONHASHSEED": "0"}
    texts = [
        subprocess.run(
            [sys.executable, "-m", module, "--help"], env=env, capture_output=True, check=True
        ).stdout
        for module in (WRAPPER, STOCK)
    ]
    assert texts[0] == texts[1] != b""


@pytest.mark.one_release
def test_bad_arguments_have_sglangs_status() -> None:
    runs = [
        subprocess.run([sys.executable, "-m", module, "--no-such-argument"], capture_output=True)
        for module in (WRAPPER, STOCK)
    ]
    assert runs[0].returncode == runs[1].returncode != 0
