"""An arm that, after its job, switches the faults of `spread_faults` in the same engine."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import wrapt

from fse_patch.lab.sglang import verify_arm, worker

from ..spread_faults import FAULTS, canary, plant
from .arm import without_detokenizer

honest_measure = verify_arm.measure


def fse_spread(self: Any, fault: str, folder: str) -> None:
    """Plant a fault in the scheduler's model, and leave what the canary says of it in ``folder``."""
    from fse_patch.adapters.role import constructed
    from fse_patch.adapters.sglang.prove import Prover

    def place(experts: Any) -> Any:
        dispatcher = experts.dispatcher
        return dispatcher.local_expert_mapping, dispatcher.local_expert_mapping.copy_

    plant(fault, place)
    said = [canary(role, Prover()) for role in constructed()]
    (Path(folder) / str(os.getpid())).write_text(json.dumps(said))


def extend(scheduler: Any) -> None:
    """Give the Scheduler class what the arm calls."""
    scheduler.Scheduler.fse_spread = fse_spread


def measure(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
    result = honest_measure(engine, job)
    if not any(told["roles"] for told in result["workers"]):
        return result  # the stock arm
    engine.collective_rpc("fse_control", factor=1.0)
    result["faults"] = {}
    for fault in FAULTS:
        with tempfile.TemporaryDirectory() as folder:
            engine.collective_rpc("fse_spread", fault=fault, folder=folder)
            said = [json.loads(path.read_text()) for path in sorted(Path(folder).iterdir())]
        logprobs = verify_arm.score(engine, job["prompts"], 1, batched=True)["logprobs"]
        result["faults"][fault] = {"canary": said, "logprobs": logprobs}
    return result


if __name__ == "__mp_main__":
    worker.install()
    wrapt.register_post_import_hook(extend, worker.SCHEDULER)
if __name__ == "__main__":
    without_detokenizer()
    verify_arm.measure = measure
    verify_arm.main(Path(sys.argv[1]), Path(sys.argv[2]))
