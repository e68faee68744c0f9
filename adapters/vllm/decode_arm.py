"""One arm of an end-to-end measurement: the real vLLM with random weights, in a process of its own.

    python -m fse_patch.adapters.vllm.decode_arm REQUEST.json

Request as of `serve`. Whether the arm is stock or fused is the process's FSE_PATCH alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fse_patch.adapters import decoding, verifying
from fse_patch.adapters.shared_sets import SharedSets
from fse_patch.errors import FsePatchError

METHODS = "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method"
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


class Engine(decoding.Engine):
    """See `decoding.Engine`."""

    def __init__(self, request: decoding.Request) -> None:
        import torch
        from vllm import LLM

        self.sets = SharedSets(request["sets"])
        self.sets.install(METHODS)
        streams = request["streams"]
        chosen = {**DEFAULTS, "max_num_seqs": max(streams)}
        if torch.cuda.is_available():
            chosen["compilation_config"] = {"cudagraph_capture_sizes": list(streams)}
        self.llm = LLM(model=request["checkpoint"], **{**chosen, **request["engine_args"]})
        self.llm.apply_model(decoding.spread)
        self.steps = 0
        step = self.llm.llm_engine.step

        def counted() -> Any:
            self.steps += 1
            return step()

        self.llm.llm_engine.step = counted

    def ready(self) -> dict[str, Any]:
        """See `decoding.Engine`."""
        import vllm

        about = {"versions": decoding.versions(vllm), "device": decoding.device()}
        return {**about, **verifying.report(), "shared": self.sets.check()}

    def generate(self, prompts: list[list[int]], tokens: int) -> Sequence[int]:
        """See `decoding.Engine`.

        Raises:
            FsePatchError: the streams did not all run at once.
        """
        from vllm import SamplingParams

        self.steps = 0
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(asked, params, use_tqdm=False)
        if self.steps > tokens + MORE_STEPS:
            raise FsePatchError(
                f"{len(prompts)} streams of {tokens} tokens took {self.steps} steps: they do not run "
                "at once; give a larger kv_cache_memory_bytes in --engine-args"
            )
        return [out.outputs[0].token_ids[-1] for out in outputs]

    def report(self) -> dict[str, Any]:
        """See `decoding.Engine`."""
        return verifying.report()

    def close(self) -> None:
        """See `decoding.Engine`."""
        self.llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    # The model in this process: what it says of itself is asked for here.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    decoding.serve(Path(sys.argv[1]), Engine)
