"""The real `vllm serve` on loopback: fused, equal to the offline run, and stopped by what must stop it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fse_patch.fusion_core.proof.compare import MAX_FLOAT32, MEAN_FLOAT32, difference
from fse_patch.lab import verify
from fse_patch.lab.ran_as_decided import ran_as_decided
from fse_patch.lab.vllm.verify_arm import EXTENSION

from .conftest import Runs
from .engine import VOCAB, Case, Checkpoints

CASE = Case("glm4_moe_scale")
START = 400.0
STOP = 60.0
FUSED = re.compile(r"\[fse_patch (\d+)\] vllm, main model: shared expert fused: .*")
# Run by Python at the start of every process of the server: faults that only the worker meets.
FAULTS = """
import wrapt


def slot_not_written(module):
    original = module.RoleLoader._write
    module.RoleLoader._write = lambda self, part: part.shard == "w2" or original(self, part)


def replaced_by_another_plugin(module):
    original = module.Glm4MoE.__init__

    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)

    module.Glm4MoE.__init__ = __init__


wrapt.register_post_import_hook({function}, "{module}")
"""
# What is wrong, and the words with which the server must say so.
STOPPED = {
    "slot_not_written": ("fse_patch.adapters.load", "never written"),
    "replaced_by_another_plugin": (
        "vllm.model_executor.models.glm4_moe",
        "another plugin may have replaced it",
    ),
}


class Server:
    """One server process, with its engine core and workers in its process group."""

    def __init__(self, checkpoint: Path, folder: Path, **env: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.checkpoint, self.log = checkpoint, folder / "server.log"
        arguments = f"--dtype float32 --max-model-len 256 --max-num-seqs 8 --worker-extension-cls {EXTENSION}"
        flags = "--enforce-eager --skip-tokenizer-init --no-enable-prefix-caching"
        address = f"--host 127.0.0.1 --port {self.port}"
        clean = {k: v for k, v in os.environ.items() if not k.startswith("FSE_PATCH")}
        with self.log.open("wb") as sink:
            self.process = subprocess.Popen(
                [
                    str(Path(sys.executable).with_name("vllm")),
                    "serve",
                    str(checkpoint),
                    *f"{address} {arguments} {flags}".split(),
                ],
                env={**clean, "VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(folder), **env},
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def post(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or b"null")

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                return True
        except OSError:
            return False

    def wait(self) -> int | None:
        """Wait until it serves (None) or has ended (its exit status)."""
        limit = time.monotonic() + START
        while time.monotonic() < limit:
            if (status := self.process.poll()) is not None:
                return status
            if self.ready():
                return None
            time.sleep(0.3)
        pytest.fail(f"neither served nor stopped in {START:.0f} s:\n{self.output}")

    def logprobs(self) -> list[list[float]]:
        """Teacher-forced log-probabilities, as the offline arm takes them."""
        prompts = verify.prompts(VOCAB)
        asked = {"model": str(self.checkpoint), "prompt": prompts, "max_tokens": 1, "temperature": 0}
        answer = self.post("/v1/completions", **asked, prompt_logprobs=0, detokenize=False)
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        return [
            [choice["prompt_logprobs"][i][str(token)]["logprob"] for i, token in enumerate(prompt) if i]
            for prompt, choice in zip(prompts, choices, strict=True)
        ]

    def end(self) -> None:
        """End it as an administrator does; what of its group that leaves is ended too."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


Start = Callable[..., Server]


@pytest.fixture
def start(checkpoints: Checkpoints, tmp_path: Path) -> Iterator[Start]:
    started: list[Server] = []

    def server(**env: str) -> Server:
        started.append(Server(checkpoints.path(CASE.recipe), tmp_path, **env))
        return started[-1]

    yield server
    for one in started:
        one.end()


@pytest.mark.parametrize("case", [CASE], ids=lambda case: case.name)
def test_served_fused_and_equal_to_the_offline_run(runs: Runs, start: Start, case: Case) -> None:
    server = start(FSE_PATCH="1")
    assert server.wait() is None, server.output
    served = server.logprobs()
    offline = runs.float32.fused[case.name]
    found = difference(served, offline["logprobs"])
    assert found.mean <= MEAN_FLOAT32
    assert found.max <= MAX_FLOAT32

    workers = server.post("/collective_rpc", method="fse_report")["results"]
    assert sorted(FUSED.findall(server.output)) == sorted(str(worker["pid"]) for worker in workers)
    assert str(server.process.pid) not in {str(worker["pid"]) for worker in workers}
    for worker in workers:
        assert ran_as_decided(runs.checkpoints.job(case).decisions[0], [worker]) == []
        assert worker["roles"][0]["calls_by_mode"]["fused"] > 0

    # The controls: neither the offline run with its fault nor the server with the same one agrees.
    assert difference(served, offline["control"]).mean > MEAN_FLOAT32
    server.post("/collective_rpc", method="fse_control", args=[verify.CONTROL_FACTORS["float32"]])
    faulty = server.logprobs()
    assert difference(faulty, offline["logprobs"]).mean > MEAN_FLOAT32
    assert difference(faulty, offline["control"]).mean <= MEAN_FLOAT32


@pytest.mark.parametrize(
    "fault", ["slot_not_written", pytest.param("replaced_by_another_plugin", marks=pytest.mark.long)]
)
def test_a_fault_in_the_worker_stops_the_server(start: Start, tmp_path: Path, fault: str) -> None:
    module, words = STOPPED[fault]
    code = FAULTS.replace("{function}", fault).replace("{module}", module)
    (tmp_path / "sitecustomize.py").write_text(code)
    # What nothing was built on yet stops a server only where that was asked for.
    server = start(
        FSE_PATCH="1", **({"FSE_PATCH_STRICT": "1"} if fault == "replaced_by_another_plugin" else {})
    )
    assert server.wait() not in (None, 0)
    assert words in server.output


def test_a_malformed_policy_stops_the_server_before_it_starts(start: Start, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "version: 1\nrules:\n  - {id: none, when: {}, fuse: maybe, why: a, source: 'none: a'}\n"
    )
    server = start(FSE_PATCH="1", FSE_PATCH_POLICY=str(policy))
    assert server.wait() == 2
    ours = [line for line in server.output.splitlines() if "fse_patch" in line]
    assert ours == [f"fse_patch: {policy}: line 3: field 'rules[0].fuse': Input should be a valid boolean"]
    assert "Traceback" not in server.output


def test_an_unknown_engine_stops_the_server_before_it_starts(start: Start) -> None:
    server = start(FSE_PATCH="bogus")
    assert server.wait() == 2
    ours = [line for line in server.output.splitlines() if "fse_patch" in line]
    assert len(ours) == 1
    assert ours[0].startswith("fse_patch: FSE_PATCH='bogus': unknown engine 'bogus'; use ")
    assert "Traceback" not in server.output
