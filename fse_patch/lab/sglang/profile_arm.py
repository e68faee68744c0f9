"""One arm of a profile: decodes in the real SGLang, in a process of its own.

    python -m fse_patch.lab.sglang.profile_arm REQUEST.json RESULT.json

Request and result as of `run_jobs`, with what `watch` asks for. Whether the arm is stock or fused is the
process's FSE_PATCH alone.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import wrapt

from fse_patch.lab import model_process, profile_arm
from fse_patch.lab.free_port import free_port
from fse_patch.lab.sglang import worker
from fse_patch.lab.sglang.verify_arm import CPU_DEFAULTS
from fse_patch.lab.verify_arm import run_jobs

DEFAULTS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "disable_radix_cache": True,
    "log_level": "warning",
    "sleep_on_idle": True,
}
# Of memory, where it is not a device's: others run here.
CPU_ROOM: dict[str, Any] = {
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
    "chunked_prefill_size": -1,
    "max_total_tokens": 2048,
    "mem_fraction_static": 0.3,
}


def decoding(batch: Any) -> int:
    """Return how many requests decode in a batch of SGLang's scheduler; 0 where it has prompts."""
    return int(batch.batch_size()) if batch.forward_mode.is_decode() else 0


def fse_watch(self: Any, asked: dict[str, Any]) -> None:
    """Let a window see the batches of this scheduler."""
    profile_arm.watch(self, "run_batch", decoding, asked)


def fse_told(self: Any, file: str) -> None:
    """Leave the window's table in a file, and what the roles of this process really ran."""
    part = Path(file).with_suffix(".part")
    part.write_text(json.dumps({**profile_arm.told(self), **model_process.report()}))
    part.replace(file)


def extend(scheduler: Any) -> None:
    """Give the Scheduler class what the calls name."""
    scheduler.Scheduler.fse_watch, scheduler.Scheduler.fse_told = fse_watch, fse_told


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Build one engine and decode in it."""
    import sglang
    import torch

    defaults = DEFAULTS if torch.cuda.is_available() else DEFAULTS | CPU_DEFAULTS | CPU_ROOM
    chosen = {**defaults, "max_running_requests": len(job["prompts"]), "nccl_port": free_port()}
    engine = sglang.Engine(model_path=job["checkpoint"], **{**chosen, **job["engine_args"]})
    try:
        params = {"temperature": 0.0, "max_new_tokens": job["new_tokens"], "ignore_eos": True}
        engine.generate(input_ids=job["prompts"], sampling_params=params)
        engine.collective_rpc("fse_watch", asked=job["window"])
        engine.generate(input_ids=job["prompts"], sampling_params=params)
        with tempfile.TemporaryDirectory(prefix="fse_patch_") as folder:
            file = Path(folder) / "told.json"
            engine.collective_rpc("fse_told", file=str(file))
            return {"workers": [json.loads(file.read_text())]}
    finally:
        engine.shutdown()


# SGLang spawns its schedulers, and a spawned process runs its parent's main module under this name.
if __name__ == "__mp_main__":
    wrapt.register_post_import_hook(extend, worker.SCHEDULER)
if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    run_jobs(Path(sys.argv[1]), Path(sys.argv[2]), run_job)
