"""One arm of an end-to-end measurement: the real SGLang with random weights, in a process of its own.

    python -m fse_patch.lab.sglang.decode_arm REQUEST.json

Request as of `serve`. Whether the arm is stock or fused is the process's FSE_PATCH alone. The model is in the
scheduler, a process that SGLang spawns and that runs this module too.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fse_patch.errors import FsePatchError
from fse_patch.lab import decode_arm
from fse_patch.lab.free_port import free_port
from fse_patch.lab.sglang import decode_worker, verify_arm

# SGLang tells of an answer when it has one token more than a multiple of this, and of its end.
EVERY = 32
# Tokens of the cache beyond those that are asked for.
MORE_TOKENS = 4096
DEFAULTS: dict[str, Any] = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "dtype": "bfloat16",
    "disable_radix_cache": True,
    "sleep_on_idle": True,  # two arms wait while the third is measured
    "log_level": "warning",
}
CUDA_DEFAULTS: dict[str, Any] = {
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    # Of what is free at the start: the cache is bounded by its tokens, and state by the requests.
    "mem_fraction_static": 0.9,
    # With graphs of prompts SGLang sizes its cache after them, from what other engines leave free by then.
    "disable_prefill_cuda_graph": True,
}
CPU_DEFAULTS: dict[str, Any] = {
    **verify_arm.CPU_DEFAULTS,
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
    "chunked_prefill_size": -1,
    "mem_fraction_static": 0.3,
}


def arguments(request: decode_arm.Request, cuda: bool) -> dict[str, Any]:
    """Return what the engine of a request gets."""
    streams = request["streams"]
    chosen = {**DEFAULTS, **(CUDA_DEFAULTS if cuda else CPU_DEFAULTS)}
    if cuda:
        chosen |= {"cuda_graph_bs_decode": list(streams), "cuda_graph_max_bs_decode": max(streams)}
    chosen |= {"max_running_requests": max(streams), "nccl_port": free_port()}
    chosen["max_total_tokens"] = request["total_tokens"] + MORE_TOKENS
    return {**chosen, **request["engine_args"]}


class Engine(decode_arm.Engine):
    """The live SGLang of an arm."""

    def __init__(self, request: decode_arm.Request) -> None:
        import sglang
        import torch

        self.request = request
        chosen = arguments(request, torch.cuda.is_available())
        self.ended: dict[int, float] = {}
        self.engine = sglang.Engine(model_path=request["checkpoint"], **chosen)

    def ready(self) -> dict[str, Any]:
        """Return what the process with the model says of itself, and the versions here.

        Raises:
            FsePatchError: the experts are not shared as asked, or the streams do not fit.
        """
        import sglang

        with tempfile.TemporaryDirectory(prefix="fse_patch_") as folder:
            file = Path(folder) / "ready.json"
            self.engine.collective_rpc("bench_open", file=str(file))
            report: dict[str, Any] = json.loads(file.read_text())
        if "error" in report:
            raise FsePatchError(report["error"])
        most = max(self.request["streams"])
        if report["requests"] < most or report["tokens"] < self.request["total_tokens"]:
            raise FsePatchError(
                f"SGLang has room for {report['requests']} requests and {report['tokens']} tokens, and "
                f"{most} streams of {self.request['total_tokens']} tokens are asked for; free memory on the "
                "device"
            )
        return {"versions": decode_arm.versions(sglang), **report}

    def generate(self, prompts: list[list[int]], tokens: int) -> Sequence[int]:
        """Return the last tokens of greedy answers."""
        params = {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True, "stream_interval": EVERY}
        had, last = [0] * len(prompts), [0] * len(prompts)
        self.ended.clear()
        for out in self.engine.generate(input_ids=prompts, sampling_params=params, stream=True):
            now, stream = time.perf_counter(), out["index"]
            had[stream], last[stream] = out["meta_info"]["completion_tokens"], out["output_ids"][-1]
            # What the first stream took alone counts for nothing.
            self.ended.setdefault(max(had), now if all(had) else math.nan)
        return last

    def reached(self) -> dict[int, float]:
        """Return when the first stream of the last call had so many tokens, where all of them ran."""
        return {tokens: when for tokens, when in self.ended.items() if not math.isnan(when)}

    def report(self) -> dict[str, Any]:
        """Return the report of the scheduler."""
        (report,) = verify_arm.reports(self.engine)
        return report

    def close(self) -> None:
        """End the engine."""
        self.engine.shutdown()


# SGLang spawns its schedulers, and a spawned process runs its parent's main module under this name.
if __name__ == "__mp_main__":
    decode_worker.install(json.loads(Path(sys.argv[1]).read_text())["sets"])
if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    decode_arm.serve(Path(sys.argv[1]), Engine)
