"""`fse-patch compare` with SGLang's own launcher and bench client."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from fse_patch.cli.compare import ENDED

from ..comparisons import Comparison
from ..running import ROOT
from .conftest import Runs
from .test_launch import SERVED

FLAGS = (
    "--dtype float32 --device cpu --attention-backend torch_native --disable-cuda-graph "
    "--disable-overlap-schedule --max-running-requests 8 --max-total-tokens 2048 --mem-fraction-static 0.3 "
    "--sleep-on-idle --skip-server-warmup"
)
CLIENT = ROOT / "tests" / "shims" / "bench_client"


def comparison(checkpoint: Path, folder: Path, *flags: str, client: bool = True) -> Comparison:
    """One with these flags of the server; without ``client``, its bench client lacks a package."""
    shims = [str(CLIENT)] if client else []
    path = os.pathsep.join(filter(None, [*shims, str(ROOT), os.environ.get("PYTHONPATH")]))
    how = ["--concurrency", "1,2", "--rounds", "2", "--input-tokens", "16", "--output-tokens", "8"]
    ours = ["-m", "fse_patch.cli.app", "compare", str(checkpoint), *how, "--out", str(folder / "out")]
    theirs = ["python", "-m", "sglang.launch_server", "--model-path", str(checkpoint), *FLAGS.split(), *flags]
    return Comparison([sys.executable, *ours, "--", *theirs], folder, {"PYTHONPATH": path})


def test_a_client_that_lacks_a_package_is_said_before_a_server_starts(runs: Runs, tmp_path: Path) -> None:
    one = comparison(runs.checkpoints.path(SERVED[0].recipe), tmp_path, client=False)
    status, told = one.end()
    assert (status, len(told)) == (2, 1)
    assert told[0].endswith("ModuleNotFoundError: No module named 'datasets'")


def test_a_port_in_use_and_ctrl_c_while_the_server_starts(runs: Runs, tmp_path: Path) -> None:
    checkpoint = runs.checkpoints.path(SERVED[0].recipe)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = str(listening.getsockname()[1])
        status, told = comparison(checkpoint, tmp_path, "--port", port).end()
    assert (status, told) == (2, [f"fse-patch: port {port} is in use; give another --port, or none"])
    one = comparison(checkpoint, tmp_path)
    one.until("stock: starting")
    time.sleep(3)
    assert len(one.note()) > 1
    one.process.send_signal(signal.SIGINT)
    assert one.end() == (130, [f"fse-patch: {ENDED}"])


@pytest.mark.long
def test_stock_fused_and_stock_again(runs: Runs, tmp_path: Path) -> None:
    one = comparison(runs.checkpoints.path(SERVED[0].recipe), tmp_path)
    one.until("fused: 1 stream")
    one.note()
    assert one.end() == (0, [])
    report = json.loads((one.out / "compare.json").read_text())
    assert [server["fused"] for server in report["servers"]] == [False, True, False]
    assert "fused, merged, layers 1-2, proof passed" in report["servers"][1]["said"][0]
    assert [row["streams"] for row in report["rows"]] == [1, 2]
    assert report["answers"]["holds"]
    assert report["answers"]["fused"]["mean"] > 0
    assert report["speed"][1:] in (one.out / "compare.html").read_text()


@pytest.mark.long
def test_hangup_while_it_is_measured(runs: Runs, tmp_path: Path) -> None:
    one = comparison(runs.checkpoints.path(SERVED[0].recipe), tmp_path)
    one.until("stock: 1 stream")
    assert len(one.note()) > 3
    one.process.send_signal(signal.SIGHUP)
    assert one.end() == (129, [f"fse-patch: {ENDED}"])
