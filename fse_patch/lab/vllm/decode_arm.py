"""One arm of an end-to-end measurement: the real vLLM with random weights, in a process of its own.

    python -m fse_patch.lab.vllm.decode_arm REQUEST.json

Request as of `serve`. Whether the arm is stock or fused is the process's FSE_PATCH alone. The model is in
this process, which the host disturbs least; with VLLM_ENABLE_V1_MULTIPROCESSING=1 in one that vLLM forks or
spawns, as `vllm serve` has it. A spawned one runs this module too.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fse_patch.errors import FsePatchError
from fse_patch.lab import decode_arm
from fse_patch.lab.vllm import decode_worker

# Steps of an answer beyond one a token: prompts, and what is scheduled ahead.
MORE_STEPS = 16
DEFAULTS: dict[str, Any] = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "dtype": "bfloat16",
    "max_model_len": 1024,
    "max_num_batched_tokens": 8192,
    "enable_prefix_caching": False,
    # Three engines share the card: each has its cache said, and profiles nothing.
    "kv_cache_memory_bytes": 6 << 30,
    "gpu_memory_utilization": 0.05,
}


class Engine(decode_arm.Engine):
    """The live vLLM of an arm."""

    def __init__(self, request: decode_arm.Request) -> None:
        from vllm import LLM
        from vllm.platforms import current_platform

        streams = request["streams"]
        chosen = {**DEFAULTS, "max_num_seqs": max(streams)}
        if current_platform.is_cuda_alike():  # torch would open the device, and vLLM could not fork
            chosen["compilation_config"] = {"cudagraph_capture_sizes": list(streams)}
        self.llm = LLM(model=request["checkpoint"], **{**chosen, **request["engine_args"]})
        opened = self.llm.apply_model(decode_worker.bench_open)
        if len(opened) != 1:
            raise FsePatchError("--end-to-end measures one process with a model: no tensor_parallel_size")
        self.opened = opened[0]
        self.ended: list[float] = []
        # Steps up to the one in which the first answer was complete: `LLM` asks for whole answers alone.
        self.together = 0
        self.tokens = 0
        step = self.llm.llm_engine.step

        def noted() -> Any:
            outputs = step()
            self.ended.append(time.perf_counter())
            if outputs and not self.together:
                self.together = len(self.ended)
            return outputs

        self.llm.llm_engine.step = noted

    def ready(self) -> dict[str, Any]:
        """Return what the process with the model says of itself, and the versions here.

        Raises:
            FsePatchError: the experts are not shared as asked.
        """
        import vllm

        if "error" in self.opened:
            raise FsePatchError(self.opened["error"])
        return {"versions": decode_arm.versions(vllm), **self.opened}

    def generate(self, prompts: list[list[int]], tokens: int) -> Sequence[int]:
        """Return the last tokens of greedy answers.

        Raises:
            FsePatchError: the streams did not all run at once.
        """
        from vllm import SamplingParams

        self.ended.clear()
        self.together, self.tokens = 0, tokens
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(asked, params, use_tqdm=False)
        if len(self.ended) > tokens + MORE_STEPS:
            raise FsePatchError(
                f"{len(prompts)} streams of {tokens} tokens took {len(self.ended)} steps: they do not run "
                "at once; give a larger kv_cache_memory_bytes in --engine-args"
            )
        return [out.outputs[0].token_ids[-1] for out in outputs]

    def reached(self) -> dict[int, float]:
        """Return when the first answer had so many tokens: each step up to its last one brought it one."""
        ended = self.ended[: self.together][-self.tokens :]
        return dict(enumerate(ended, self.tokens - len(ended) + 1))

    def report(self) -> dict[str, Any]:
        """Return the report of the process with the model."""
        report: dict[str, Any]
        (report,) = self.llm.apply_model(decode_worker.report)
        return report

    def close(self) -> None:
        """End the engine."""
        self.llm.llm_engine.engine_core.shutdown()


# A spawned process runs its parent's main module under this name.
if __name__ in ("__main__", "__mp_main__"):
    decode_worker.SETS.number = json.loads(Path(sys.argv[1]).read_text())["sets"]
    decode_worker.SETS.install(decode_worker.METHODS)
if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    # Functions of our own are called in the process with the model.
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    decode_arm.serve(Path(sys.argv[1]), Engine)
