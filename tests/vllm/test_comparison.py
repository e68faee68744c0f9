"""`fse-patch compare` with the real `vllm serve` and its own bench client."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import socket
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from fse_patch.cli.compare import ENDED
from fse_patch.lab.compare import servers
from fse_patch.lab.free_port import free_port

from ..comparisons import Comparison, processes
from ..running import ROOT
from .engine import Checkpoints
from .test_serve import CASE, START

FLAGS = "--dtype float32 --max-model-len 256 --max-num-seqs 8 --enforce-eager"


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


def launch(checkpoint: Path, *flags: str) -> list[str]:
    return ["vllm", "serve", str(checkpoint), *FLAGS.split(), *flags]


def comparison(checkpoint: Path, folder: Path, *of: str) -> Comparison:
    """One of these servers: a launch command behind --, or two URLs."""
    how = ["--concurrency", "1,2", "--rounds", "3", "--input-tokens", "16", "--output-tokens", "8"]
    ours = ["-m", "fse_patch.cli.app", "compare", str(checkpoint), *how, "--out", str(folder / "out")]
    return Comparison([sys.executable, *ours, *of], folder, environment())


def test_a_wrong_model_and_a_port_in_use(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoint = checkpoints.path(CASE.recipe)
    (tmp_path / "a").mkdir()
    status, told = comparison(checkpoint, tmp_path / "a", "--", *launch(tmp_path / "other")).end()
    assert (status, len(told)) == (2, 1)
    assert f"serves '{tmp_path / 'other'}'" in told[0]
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        (tmp_path / "b").mkdir()
        one = comparison(checkpoint, tmp_path / "b", "--", *launch(checkpoint, "--port", str(port)))
        status, told = one.end()
    assert (status, len(told)) == (2, 1)
    assert f"port {port} is in use" in told[0]


def test_ctrl_c_while_the_server_starts(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoint = checkpoints.path(CASE.recipe)
    one = comparison(checkpoint, tmp_path, "--", *launch(checkpoint))
    one.until("stock: starting")
    time.sleep(3)
    assert len(one.note()) > 1
    one.process.send_signal(signal.SIGINT)
    assert one.end() == (130, [f"fse-patch: {ENDED}"])
    assert not one.out.exists()


@pytest.mark.long
def test_an_engine_that_does_not_start(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoint = checkpoints.path(CASE.recipe)
    one = comparison(checkpoint, tmp_path, "--", *launch(checkpoint, "--max-model-len", "999999"))
    status, told = one.end()
    assert (status, len(told)) == (4, 1)
    assert told[0].startswith("fse-patch: stock server: ended with status 1: ")


@pytest.mark.long
def test_stock_fused_and_stock_again(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoint = checkpoints.path(CASE.recipe)
    one = comparison(checkpoint, tmp_path, "--", *launch(checkpoint))
    one.until("fused: 1 stream")
    one.note()
    status, told = one.end()
    assert (status, told) == (0, [])
    report = json.loads((one.out / "compare.json").read_text())
    stock, fused, again = report["servers"]
    assert (stock["fused"], fused["fused"], again["fused"]) == (False, True, False)
    assert "FSE_PATCH is not set in this server" in stock["said"][0]
    assert "fused, merged, layers 1-2, proof passed" in fused["said"][0]
    assert [row["streams"] for row in report["rows"]] == [1, 2]
    for row in report["rows"]:
        assert min(row[f"{arm}_tokens_per_second"] for arm in ("stock", "fused", "again")) > 0
    assert report["answers"]["holds"]
    assert report["answers"]["fused"]["mean"] > 0  # the control: they are two servers, and not one
    page = (one.out / "compare.html").read_text()
    assert report["speed"][1:] in page
    assert fused["said"][0] in page
    with (one.out / "compare.csv").open(newline="") as file:
        assert [row["streams"] for row in csv.DictReader(file)] == ["1", "2"]
    assert (one.out / "compare.png").stat().st_size > 1000


@pytest.mark.long
@pytest.mark.parametrize(
    ("phase", "number"), [("stock: 1 stream", signal.SIGTERM), ("fused: starting", signal.SIGHUP)]
)
def test_ended_later(checkpoints: Checkpoints, tmp_path: Path, phase: str, number: signal.Signals) -> None:
    checkpoint = checkpoints.path(CASE.recipe)
    one = comparison(checkpoint, tmp_path, "--", *launch(checkpoint))
    one.until(phase)
    time.sleep(3)
    assert len(one.note()) > 1
    one.process.send_signal(number)
    assert one.end() == (128 + number, [f"fse-patch: {ENDED}"])


@pytest.mark.long
def test_a_server_that_is_killed(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoint = checkpoints.path(CASE.recipe)
    one = comparison(checkpoint, tmp_path, "--", *launch(checkpoint))
    one.until("stock: 1 stream")
    mine, there = one.note() - {one.process.pid}, processes()
    (server,) = (process for process in mine if "vllm serve " in there.get(process, (0, ""))[1])
    os.kill(server, signal.SIGKILL)
    assert one.end() == (4, ["fse-patch: stock server: ended with status -9"])


@pytest.mark.long
def test_two_servers_that_run_and_a_wrong_one(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoint = checkpoints.path(CASE.recipe)
    # The control: the same model with other weights.
    wrong = checkpoints.path(CASE.recipe, seed=5)
    around = {**os.environ, **environment()}
    with ExitStack() as stack:

        def start(name: str, folder: Path, fused: bool) -> str:
            port = free_port()
            words = servers.launch_words("vllm", launch(folder), fused, port)
            env = servers.environment_of("vllm", launch(folder), fused, around)
            log = tmp_path / f"{name}.log"
            return stack.enter_context(servers.started(name, words, env, port, log, START)).url

        stock, fused = start("stock", checkpoint, False), start("fused", checkpoint, True)
        one = comparison(checkpoint, tmp_path, "--stock", stock, "--fused", fused)
        assert one.end() == (0, [])
        report = json.loads((one.out / "compare.json").read_text())
        assert [server["fused"] for server in report["servers"]] == [False, True, False]
        shutil.rmtree(one.out)
        status, told = comparison(checkpoint, tmp_path, "--stock", fused, "--fused", fused).end()
        assert (status, len(told)) == (2, 1)
        assert "the stock server is fused" in told[0]
        status, told = comparison(checkpoint, tmp_path, "--stock", stock, "--fused", stock).end()
        assert (status, len(told)) == (3, 1)
        other = start("other", wrong, True)
        assert comparison(checkpoint, tmp_path, "--stock", stock, "--fused", other).end()[0] == 1
        assert "DO NOT agree" in (one.out / "compare.html").read_text()
