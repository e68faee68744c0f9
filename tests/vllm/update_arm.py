"""An arm of two processes that share the layers: answers before and after updates of the running engine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from fse_patch.adapters.load import RoleLoader
from fse_patch.lab.vllm import verify_arm
from fse_patch.lab.vllm.worker import VerifyExtension

from .fault_arm import KV_CACHE, kernels_once


class UpdateExtension(VerifyExtension):
    """What the arm asks a worker for."""

    def fse_update(self, folder: str, part: str) -> None:
        """Reload the tensors of a checkpoint whose names have ``part``, as they are sent in memory."""
        tensors = [
            (name, tensor)
            for file in sorted(Path(folder).glob("*.safetensors"))
            for name, tensor in load_file(file).items()
            if part in name
        ]
        self.reload_weights(weights_iterator=tensors)  # type: ignore[attr-defined]

    def fse_deaf(self) -> None:
        """Plant a fault: from now on updates leave the slots as they are."""
        RoleLoader._write = lambda self, part: None  # type: ignore[method-assign]


def measure(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Return answers by what was done last: nothing, updates, and one that leaves the slots as they are."""

    def answers() -> list[list[float]]:
        scored: list[list[float]] = verify_arm.score(llm, job["prompts"], 1, batched=True)["logprobs"]
        return scored

    def update(folder: str) -> None:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})

    old, new = job["checkpoint"], job["new"]
    found = {"old": answers()}
    llm.collective_rpc("fse_update", args=(new, ".shared_expert"))
    found["shared"] = answers()
    update(new)
    found["new"] = answers()
    update(old)
    found["old again"] = answers()
    found["workers"] = llm.collective_rpc("fse_report")
    llm.collective_rpc("fse_deaf")
    update(new)
    found["deaf"] = answers()
    return found


honest_run = verify_arm.run_job


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    job["new"] = job["engine_args"].pop("new", "")
    if job["new"]:
        verify_arm.measure = measure
    return honest_run(job)


if __name__ == "__main__":
    kernels_once()
    verify_arm.DEFAULTS |= {
        "worker_extension_cls": "tests.vllm.update_arm.UpdateExtension",
        "kv_cache_memory_bytes": KV_CACHE,
    }
    verify_arm.run_job = run_job
    verify_arm.main(Path(sys.argv[1]), Path(sys.argv[2]))
