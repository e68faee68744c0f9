"""One arm of a verification: runs checkpoints in the real SGLang, in a process of its own.

    python -m fse_patch.lab.sglang.verify_arm REQUEST.json RESULT.json

Request and result as of `run_jobs`. Whether the arm is stock or fused is the process's FSE_PATCH alone: the
code that runs is the same.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fse_patch.errors import FsePatchError
from fse_patch.lab.free_port import free_port
from fse_patch.lab.sglang import worker
from fse_patch.lab.verify_arm import BEST, has_head, measure_head, run_jobs

DEFAULTS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "disable_cuda_graph": True,
    "disable_radix_cache": True,
    "disable_overlap_schedule": True,
    "chunked_prefill_size": -1,
    "max_running_requests": 8,
    "max_total_tokens": 2048,
    "mem_fraction_static": 0.3,
    "log_level": "warning",
    # Its scheduler otherwise holds a core while it waits.
    "sleep_on_idle": True,
}
REPORTS_WAIT = 60.0  # seconds
CPU_DEFAULTS = {"device": "cpu", "attention_backend": "torch_native"}


def score(engine: Any, prompts: list[list[int]], new_tokens: int, batched: bool) -> dict[str, Any]:
    """Return log-probabilities of every prompt token but the first, and greedy tokens with the best."""
    params = {"temperature": 0.0, "max_new_tokens": new_tokens, "ignore_eos": True}
    outputs = [
        out
        for batch in ([prompts] if batched else [[p] for p in prompts])
        for out in engine.generate(
            input_ids=batch,
            sampling_params=params,
            return_logprob=True,
            logprob_start_len=0,
            top_logprobs_num=BEST,
        )
    ]
    # The last id of the vocabulary is scored as id 0, in both arms alike.
    scored = [out["meta_info"]["input_token_logprobs"] for out in outputs]
    return {
        "logprobs": [[value for value, *_ in tokens[1:]] for tokens in scored],
        "greedy": [list(out["output_ids"]) for out in outputs],
        "greedy_best": [best_of_steps(out["meta_info"]) for out in outputs],
    }


def best_of_steps(told: dict[str, Any]) -> list[list[tuple[int, float]]]:
    """Return token ids and log-probabilities of each step of an answer, with those that were taken."""
    taken, best = told["output_token_logprobs"], told["output_top_logprobs"]
    return [
        [(token, value) for value, token, *_ in (*step, one)] for one, step in zip(taken, best, strict=True)
    ]


def reports(engine: Any) -> list[dict[str, Any]]:
    """Return the report of every scheduler process. SGLang's calls return nothing, so each leaves a file.

    Raises:
        FsePatchError: a process has left none.
    """
    server = engine.server_args
    processes, last = server.tp_size * server.pp_size, time.monotonic() + REPORTS_WAIT
    with tempfile.TemporaryDirectory(prefix="fse_patch_") as folder:
        engine.collective_rpc("fse_report", folder=folder)
        # The call returns when the first pipeline stage has made it; it travels on from there.
        while len(files := sorted(Path(folder).glob("*.json"))) < processes:
            if time.monotonic() > last:
                raise FsePatchError(f"{len(files)} of {processes} processes told what they ran")
            time.sleep(0.05)
        return [json.loads(path.read_text()) for path in files]


def start(job: dict[str, Any]) -> Any:
    """Start the engine of a job."""
    import sglang
    import torch

    defaults = DEFAULTS if torch.cuda.is_available() else DEFAULTS | CPU_DEFAULTS
    return sglang.Engine(
        model_path=job["checkpoint"], **{**defaults, "nccl_port": free_port(), **job["engine_args"]}
    )


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Build one engine and run one job in it."""
    engine = start(job)
    try:
        return measure(engine, job)
    finally:
        engine.shutdown()


def measure(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Return all that a job asks of a running engine; its control stays in force."""
    dtype = job["engine_args"]["dtype"]
    engine.collective_rpc("fse_reset")
    held = reports(engine)
    engine.collective_rpc("fse_head", state="off")
    result = {
        "dtype": dtype,
        **score(engine, job["prompts"], job["new_tokens"], batched=True),
        "workers": reports(engine),
        "rebatched": score(engine, job["prompts"], 1, batched=False)["logprobs"],
    }
    engine.collective_rpc("fse_control", factor=job["control_factor"])
    result["control_answers"] = score(engine, job["prompts"], job["new_tokens"], batched=True)
    result["control"] = result["control_answers"].pop("logprobs")
    if has_head(held):
        engine.collective_rpc("fse_control", factor=1.0)
        result |= measure_head(
            lambda state: engine.collective_rpc("fse_head", state=state),
            lambda: score(engine, job["prompts"], job["new_tokens"], batched=False),
            lambda: reports(engine),
        )
    result["lm_heads"] = [worker["lm_heads"] for worker in held]
    if dtype in ("bfloat16", "float16"):
        engine.collective_rpc("fse_control", factor=1.0)
        engine.collective_rpc("fse_jitter", seed=0)
        result["jittered"] = score(engine, job["prompts"], 1, batched=True)["logprobs"]
    return result


def main(request: Path, result: Path) -> None:
    """Run all jobs."""
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    run_jobs(request, result, run_job)


# SGLang spawns its schedulers, and a spawned process runs its parent's main module under this name.
if __name__ == "__mp_main__":
    worker.install()
if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
