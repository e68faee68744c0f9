"""An arm that, after its job, switches the faults of `spread_faults` in the same engine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from fse_patch.lab.vllm import verify_arm
from fse_patch.lab.vllm.worker import VerifyExtension

from ..spread_faults import FAULTS, canary, plant
from .fault_arm import KV_CACHE, kernels_once

honest_measure = verify_arm.measure


class SpreadExtension(VerifyExtension):
    """What the arm asks a worker for."""

    def fse_spread(self, fault: str) -> list[str]:
        """Plant a fault, and let the canary look at the layers again."""
        from fse_patch.adapters.role import constructed
        from fse_patch.adapters.vllm.prove import Prover

        def place(experts: Any) -> Any:
            return experts._expert_map, experts._expert_map.copy_

        plant(fault, place)
        prover = Prover(self.vllm_config)  # type: ignore[attr-defined]
        return [canary(role, prover) for role in constructed()]


def measure(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    result = honest_measure(llm, job)
    if not any(worker["roles"] for worker in result["workers"]):
        return result  # the stock arm
    llm.collective_rpc("fse_control", args=(1.0,))
    result["faults"] = {}
    for fault in FAULTS:
        said = llm.collective_rpc("fse_spread", args=(fault,))
        logprobs = verify_arm.score(llm, job["prompts"], 1, batched=True)["logprobs"]
        result["faults"][fault] = {"canary": said, "logprobs": logprobs}
    return result


if __name__ == "__main__":
    kernels_once()
    verify_arm.DEFAULTS |= {
        "worker_extension_cls": "tests.vllm.spread_arm.SpreadExtension",
        "kv_cache_memory_bytes": KV_CACHE,
    }
    verify_arm.measure = measure
    verify_arm.main(Path(sys.argv[1]), Path(sys.argv[2]))
