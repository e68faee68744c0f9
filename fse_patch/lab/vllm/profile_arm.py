"""One arm of a profile: decodes in the real vLLM, in a process of its own.

    python -m fse_patch.lab.vllm.profile_arm REQUEST.json RESULT.json

Request and result as of `run_jobs`, with what `watch` asks for. Whether the arm is stock or fused is the
process's FSE_PATCH alone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from fse_patch.lab import model_process, profile_arm
from fse_patch.lab.verify_arm import run_jobs
from fse_patch.lab.vllm.verify_arm import shut_down

EXTENSION = "fse_patch.lab.vllm.profile_arm.ProfileExtension"
DEFAULTS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
    "worker_extension_cls": EXTENSION,
}


def decoding(scheduled: Any) -> int:
    """Return how many requests decode in a step of vLLM's scheduler; 0 where one still has a prompt."""
    drafts = scheduled.scheduled_spec_decode_tokens
    counts = scheduled.num_scheduled_tokens
    plain = all(count == 1 + len(drafts.get(request, ())) for request, count in counts.items())
    return len(counts) if plain and not scheduled.scheduled_new_reqs else 0


class ProfileExtension:
    """Mixed into vLLM's worker by ``worker_extension_cls``; called with ``collective_rpc``."""

    def fse_watch(self, asked: dict[str, Any]) -> None:
        """Let a window see the steps of this worker."""
        profile_arm.watch(self, "execute_model", decoding, asked)

    def fse_told(self) -> dict[str, Any]:
        """Return the window's table, and what the roles of this worker really ran."""
        return {**profile_arm.told(self), **model_process.report()}


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Build one engine and decode in it."""
    from vllm import LLM, SamplingParams

    llm = None
    try:
        chosen = {**DEFAULTS, "max_num_seqs": len(job["prompts"]), **job["engine_args"]}
        llm = LLM(model=job["checkpoint"], **chosen)
        params = SamplingParams(
            temperature=0, max_tokens=job["new_tokens"], ignore_eos=True, detokenize=False
        )
        asked = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
        llm.generate(asked, params, use_tqdm=False)
        llm.collective_rpc("fse_watch", args=(job["window"],))
        llm.generate(asked, params, use_tqdm=False)
        return {"workers": llm.collective_rpc("fse_told")}
    finally:
        shut_down(llm)


if __name__ == "__main__":
    run_jobs(Path(sys.argv[1]), Path(sys.argv[2]), run_job)
