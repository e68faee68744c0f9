"""One arm of a verification: runs checkpoints in the real vLLM, in a process of its own.

    python -m fse_patch.lab.vllm.verify_arm REQUEST.json RESULT.json

Request and result as of `run_jobs`. Whether the arm is stock or fused is the process's FSE_PATCH alone: the
code that runs is the same.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from fse_patch.lab.verify_arm import BEST, has_head, measure_head, run_jobs

EXTENSION = "fse_patch.lab.vllm.worker.VerifyExtension"
DEFAULTS: dict[str, Any] = {
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
    "worker_extension_cls": EXTENSION,
}
ROUND_SCALES = "VLLM_USE_DEEP_GEMM_E8M0"


def keep_scales(environment: MutableMapping[str, str]) -> dict[str, str]:
    """Let both arms compute with the scales of the checkpoint, unless the user has said how.

    On Hopper, vLLM by default rounds the scales of dense FP8 layers to powers of two, and their weights anew:
    of stock's shared expert, but of no expert. The arms would differ by that, and not by what fuses them.

    Returns:
        What was set.
    """
    from vllm.platforms import current_platform

    # AMD has devices of this number too.
    on_hopper = current_platform.is_cuda() and current_platform.is_device_capability(90)
    if ROUND_SCALES in environment or not on_hopper:
        return {}
    environment[ROUND_SCALES] = "0"
    return {ROUND_SCALES: "0"}


def score(llm: Any, prompts: list[list[int]], new_tokens: int, batched: bool) -> dict[str, Any]:
    """Return log-probabilities of every prompt token but the first, and greedy tokens with the best."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0,
        max_tokens=new_tokens,
        prompt_logprobs=0,
        logprobs=BEST,
        ignore_eos=True,
        detokenize=False,
    )
    asked = [{"prompt_token_ids": p} for p in prompts]
    batches = [asked] if batched else [[p] for p in asked]
    outputs = [out for batch in batches for out in llm.generate(batch, params, use_tqdm=False)]
    return {
        "logprobs": [
            [out.prompt_logprobs[i][token].logprob for i, token in enumerate(prompt) if i]
            for prompt, out in zip(prompts, outputs, strict=True)
        ],
        "greedy": [list(out.outputs[0].token_ids) for out in outputs],
        "greedy_best": [
            [[(token, entry.logprob) for token, entry in step.items()] for step in out.outputs[0].logprobs]
            for out in outputs
        ],
    }


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Build one engine and run one job in it."""
    from vllm import LLM

    llm = None
    # The engine collects garbage several times a start; what is loaded by now need not be walked each time.
    gc.freeze()
    try:
        llm = LLM(model=job["checkpoint"], **{**DEFAULTS, **job["engine_args"]})
        return measure(llm, job)
    finally:
        shut_down(llm)


def measure(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Return all that a job asks of a running engine; its control stays in force."""
    llm.collective_rpc("fse_warm_up")
    held = llm.collective_rpc("fse_report")
    llm.collective_rpc("fse_head", args=("off",))
    llm.collective_rpc("fse_reset")
    config = llm.llm_engine.vllm_config.model_config
    result = {
        "dtype": str(config.dtype).removeprefix("torch."),
        **score(llm, job["prompts"], job["new_tokens"], batched=True),
        "workers": llm.collective_rpc("fse_report"),
        "rebatched": score(llm, job["prompts"], 1, batched=False)["logprobs"],
    }
    llm.collective_rpc("fse_control", args=(job["control_factor"],))
    result["control_answers"] = score(llm, job["prompts"], job["new_tokens"], batched=True)
    result["control"] = result["control_answers"].pop("logprobs")
    if has_head(held):
        llm.collective_rpc("fse_control", args=(1.0,))
        result |= measure_head(
            lambda state: llm.collective_rpc("fse_head", args=(state,)),
            lambda: score(llm, job["prompts"], job["new_tokens"], batched=False),
            lambda: llm.collective_rpc("fse_report"),
        )
    result["lm_heads"] = [worker["lm_heads"] for worker in held]
    if config.dtype.itemsize == 2:
        llm.collective_rpc("fse_control", args=(1.0,))
        llm.collective_rpc("fse_jitter", args=(0,))
        result["jittered"] = score(llm, job["prompts"], 1, batched=True)["logprobs"]
    return result


def shut_down(llm: Any) -> None:
    """Free one engine, so that the next one starts as in a new process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    from ... import runtime
    from ...adapters.head import HEADS
    from ...adapters.paired import PAIRED_ROLES
    from ...adapters.role import CONSTRUCTED

    if llm is not None:
        llm.llm_engine.engine_core.shutdown()
    del llm
    CONSTRUCTED.clear()
    PAIRED_ROLES.clear()
    HEADS.clear()
    runtime.clear()
    cleanup_dist_env_and_memory()  # collects what is left of it


def main(request: Path, result: Path) -> None:
    """Run all jobs; each result also has ``environment``, what `keep_scales` set."""
    changed = keep_scales(os.environ)
    run_jobs(request, result, lambda job: {**run_job(job), "environment": changed})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
