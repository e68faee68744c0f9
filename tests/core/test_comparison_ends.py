"""However a comparison ends, there is a line that says so, and no process and no file of it is left."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fse_patch.cli.compare import ENDED
from fse_patch.errors import EngineError, FsePatchError
from fse_patch.lab.compare import servers
from fse_patch.lab.compare.process import Child, held_back

from ..comparisons import Comparison, left
from .compare_parts import DEAF

RUN = Path(__file__).with_name("compare_run.py")


def comparison(folder: Path, fault: str = "none") -> Comparison:
    return Comparison([sys.executable, str(RUN), str(folder / "out"), fault], folder, {})


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        ("stock: starting", signal.SIGINT),
        ("stock: checking answers", signal.SIGINT),
        ("stock: 2 streams", signal.SIGTERM),
        ("fused: starting", signal.SIGHUP),
        ("stock again: 1 stream", signal.SIGINT),
    ],
)
def test_interrupted_in_every_phase(tmp_path: Path, phase: str, number: signal.Signals) -> None:
    one = comparison(tmp_path)
    one.until(phase)
    time.sleep(0.1)
    # The control: there is something to end.
    assert len(one.note()) > 1
    one.process.send_signal(number)
    status, told = one.end()
    assert status == 128 + number
    assert told == [f"fse-patch: {ENDED}"]
    assert not one.out.exists()


def test_it_ends_well_and_leaves_its_files_alone(tmp_path: Path) -> None:
    one = comparison(tmp_path)
    assert one.end() == (0, [])
    assert sorted(path.name for path in one.out.iterdir()) == ["compare.csv", "compare.html", "compare.json"]


@pytest.mark.parametrize(
    ("fault", "status", "words"),
    [
        ("no-start", 4, "stock server: ended with status 1: OSError: no memory is left"),
        (
            "client",
            2,
            "vllm bench client, 1 stream: ended with status 1: ModuleNotFoundError: No module",
        ),
        ("not-fused", 3, "disabled: the fused server is stock: off"),
    ],
)
def test_a_failure_is_a_line_and_a_status(tmp_path: Path, fault: str, status: int, words: str) -> None:
    one = comparison(tmp_path, fault)
    ended, told = one.end()
    assert ended == status
    assert len(told) == 1
    assert told[0].startswith(f"fse-patch: {words}")
    assert not one.out.exists()


def test_wrong_answers_are_status_1(tmp_path: Path) -> None:
    one = comparison(tmp_path, "wrong")
    assert one.end()[0] == 1
    assert "DO NOT agree" in (one.out / "compare.html").read_text()


def test_a_server_that_is_killed_is_a_line(tmp_path: Path) -> None:
    one = comparison(tmp_path)
    one.until("fused: 1 stream")
    time.sleep(0.1)
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"serve" in words and str(one.out).encode() in words:
            os.kill(int(file.parent.name), signal.SIGKILL)
    assert one.end() == (4, ["fse-patch: fused server: ended with status -9"])


def test_a_port_in_use_is_said_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        with (
            pytest.raises(FsePatchError, match=f"port {port} is in use"),
            servers.started("stock", ["/bin/false"], {}, port, tmp_path / "log", 5.0),
        ):
            pass
    assert not (tmp_path / "log").exists()
    # The control: once it is free, the process is started, and ends.
    with (
        pytest.raises(EngineError, match="ended with status 1"),
        servers.started("stock", ["/bin/false"], {}, port, tmp_path / "log", 5.0),
    ):
        pass


def test_a_program_that_is_not_there_and_a_server_that_is_never_ready(tmp_path: Path) -> None:
    for words, error in (
        ([str(tmp_path / "none")], "No such file"),
        (["/bin/sleep", "60"], "not ready in 1 s"),
    ):
        with (
            pytest.raises(FsePatchError, match=error),
            servers.started("stock", words, {}, servers_port(), tmp_path / "log", 1.0),
        ):
            pass


def servers_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_a_child_goes_with_its_children(tmp_path: Path) -> None:
    mark = str(tmp_path)
    nested = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {DEAF!r}, {mark!r}])"
    words = [sys.executable, "-c", f"{nested}; print('up', flush=True); time.sleep(600)", mark]
    with Child("a child", words, dict(os.environ), tmp_path / "log") as child:
        while not child.log:
            time.sleep(0.05)
        assert len(left(mark)) == 2
    assert left(mark) == []


@pytest.fixture
def hears_ctrl_c() -> Iterator[None]:
    """A process in a shell's background does not, and hands that on to its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("hears_ctrl_c")
def test_a_signal_waits_while_a_process_is_made() -> None:
    reached: list[str] = []

    def interrupted(name: str) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        reached.append(name)

    with pytest.raises(KeyboardInterrupt), held_back():
        interrupted("held back")
    # The control: it is not held back any more.
    with pytest.raises(KeyboardInterrupt):
        interrupted("not held back")
    assert reached == ["held back"]
