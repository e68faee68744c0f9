"""An arm with LoRA on: answers without and with an adapter of the attention, and what is said of others."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from fse_patch.lab.sglang import verify_arm, worker

from .arm import without_detokenizer

honest_run = verify_arm.run_job
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
ARGUMENTS = {
    "enable_lora": True,
    "max_lora_rank": 8,
    "lora_target_modules": TARGETS,
    "lora_backend": "torch_native",
}


def without_pinned_memory() -> None:
    """Let SGLang's LoRA run where there is no accelerator: it asks for memory that only one of them has."""
    import torch

    for name in ("tensor", "empty", "zeros", "ones"):
        honest = getattr(torch, name)

        def unpinned(*args: Any, honest: Any = honest, **kwargs: Any) -> Any:
            kwargs.pop("pin_memory", None)
            return honest(*args, **kwargs)

        setattr(torch, name, unpinned)
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]


def logprobs(engine: Any, job: dict[str, Any], adapter: str | None) -> list[list[float]]:
    outputs = engine.generate(
        input_ids=job["prompts"],
        sampling_params={"temperature": 0.0, "max_new_tokens": 1, "ignore_eos": True},
        return_logprob=True,
        logprob_start_len=0,
        lora_path=[adapter] * len(job["prompts"]),
    )
    return [[value for value, *_ in out["meta_info"]["input_token_logprobs"][1:]] for out in outputs]


def said(engine: Any, kind: str, path: str) -> str:
    """What SGLang says of an adapter that arrives; nothing where it takes it."""
    result = engine.load_lora_adapter(kind, path)
    return "" if result.success else str(result.error_message)


def started_with(kind: str, path: str, job: dict[str, Any]) -> dict[str, Any]:
    """Answers of an engine that starts with one adapter, and takes its modules from that."""
    job["engine_args"] |= {"lora_target_modules": None, "lora_paths": {kind: path}}

    def measure(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
        engine.collective_rpc("fse_reset")
        answers = {"plain": logprobs(engine, job, None), "adapted": logprobs(engine, job, kind)}
        return {**answers, "workers": verify_arm.reports(engine)}

    verify_arm.measure = measure
    return honest_run(job)


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    adapters = job["engine_args"].pop("adapters")
    if kind := job["engine_args"].pop("at_start", ""):
        return started_with(kind, adapters[kind], job)

    def measure(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
        engine.collective_rpc("fse_reset")
        told = {kind: said(engine, kind, path) for kind, path in adapters.items()}
        assert told.pop("attention") == "", told
        return {
            "plain": logprobs(engine, job, None),
            "adapted": logprobs(engine, job, "attention"),
            "said": told,
            "after": logprobs(engine, job, None),
            "workers": verify_arm.reports(engine),
        }

    verify_arm.measure = measure
    return honest_run(job)


if __name__ == "__mp_main__":
    worker.install()
    without_pinned_memory()
if __name__ == "__main__":
    without_detokenizer()
    verify_arm.DEFAULTS |= ARGUMENTS
    verify_arm.run_job = run_job
    verify_arm.main(Path(sys.argv[1]), Path(sys.argv[2]))
