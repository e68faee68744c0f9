"""An arm with LoRA on: answers without and with an adapter of the attention, and what is said of others."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from fse_patch.lab.vllm import verify_arm

from .fault_arm import KV_CACHE, kernels_once

honest_run = verify_arm.run_job
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
ARGUMENTS = {"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": TARGETS, "max_cpu_loras": 4}


def logprobs(llm: Any, job: dict[str, Any], adapter: Any) -> list[list[float]]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    asked = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    outputs = llm.generate(asked, params, use_tqdm=False, lora_request=adapter)
    return [
        [out.prompt_logprobs[i][token].logprob for i, token in enumerate(prompt) if i]
        for prompt, out in zip(job["prompts"], outputs, strict=True)
    ]


def said(llm: Any, adapter: Any) -> str:
    """What vLLM says of an adapter that arrives; nothing where it takes it."""
    try:
        llm.llm_engine.add_lora(adapter)
    except Exception as error:
        return str(error)
    return ""


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    adapters = job["engine_args"].pop("adapters")

    def measure(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
        from vllm.lora.request import LoRARequest

        requests = {kind: LoRARequest(kind, n, path) for n, (kind, path) in enumerate(adapters.items(), 1)}
        llm.collective_rpc("fse_reset")
        return {
            "plain": logprobs(llm, job, None),
            "adapted": logprobs(llm, job, requests["attention"]),
            "said": {kind: said(llm, request) for kind, request in requests.items() if kind != "attention"},
            "after": logprobs(llm, job, None),
            "workers": llm.collective_rpc("fse_report"),
        }

    verify_arm.measure = measure
    return honest_run(job)


if __name__ == "__main__":
    kernels_once()
    verify_arm.DEFAULTS |= ARGUMENTS | {"kv_cache_memory_bytes": KV_CACHE}
    verify_arm.run_job = run_job
    verify_arm.main(Path(sys.argv[1]), Path(sys.argv[2]))
