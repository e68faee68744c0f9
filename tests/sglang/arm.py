"""The arm of the tests: its jobs can ask for a deliberate fault in our own code, or for steps; see `live`.

The model is in a process that SGLang spawns. It runs this module too, and finds the fault in its environment.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import wrapt

from fse_patch.adapters import verifying
from fse_patch.adapters.sglang import arm, construct, worker
from fse_patch.adapters.sglang.fusion import ModelFusion
from fse_patch.fusion_core.remap import Remap, SlotTensor

from . import live

VARIABLE = "FSE_PATCH_TEST_FAULT"
honest_slots, honest_write, honest_run = Remap._slots, ModelFusion._write, arm.run_job


def change_slots(change: Callable[[SlotTensor], SlotTensor]) -> None:
    """Replace every slot tensor of the stream by ``change`` of it."""

    def slots(self: Remap, *args: Any) -> Iterator[SlotTensor]:
        return (change(part) for part in honest_slots(self, *args))

    Remap._slots = slots  # type: ignore[method-assign]


def off_by_1_percent(part: SlotTensor) -> SlotTensor:
    first = part.layer == 0 and part.shard == "w2"
    return dataclasses.replace(part, tensor=part.tensor * 1.01) if first else part


def swapped(part: SlotTensor) -> SlotTensor:
    other = {"w1": "w3", "w3": "w1", "w2": "w2"}
    return dataclasses.replace(part, shard=other[part.shard])


def without_down(self: ModelFusion, part: SlotTensor) -> None:
    if part.shard != "w2":
        honest_write(self, part)


def twice(self: ModelFusion, part: SlotTensor) -> None:
    for _ in range(2):
        honest_write(self, part)


def deaf(self: ModelFusion, part: SlotTensor) -> None:
    """An update leaves the slots as they are."""
    if self.audit.loads == 0:
        honest_write(self, part)
    else:
        self.audit.wrote(part)


FAULTS: dict[str, Callable[[], None]] = {
    "shared_weight_1_percent": lambda: change_slots(off_by_1_percent),
    "gate_and_up_swapped": lambda: change_slots(swapped),
    "down_proj_dropped": lambda: setattr(ModelFusion, "_write", without_down),
    "slot_written_twice": lambda: setattr(ModelFusion, "_write", twice),
    "scale_in_the_slot": lambda: setattr(construct, "output_scale", lambda *_: 1.0),
    "deaf_to_updates": lambda: setattr(ModelFusion, "_write", deaf),
    "patch_never_fired": lambda: setattr(construct, "decide_for", lambda *_: None),
    "control_without_effect": lambda: setattr(verifying, "control", lambda _: None),
}


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    os.environ[VARIABLE] = job["engine_args"].pop("fault", "")
    # The log-probabilities have to show a fault by themselves: the canary would stop most of them before.
    os.environ["FSE_PATCH_VERIFY"] = "off" if os.environ[VARIABLE] else "sample"
    result = live.run_steps(job) if "steps" in job["engine_args"] else honest_run(job)
    return {**result, "arm_pid": os.getpid()}


if __name__ == "__mp_main__":
    worker.install()
    wrapt.register_post_import_hook(live.extend, worker.SCHEDULER)
    if fault := os.environ.get(VARIABLE):
        FAULTS[fault]()
if __name__ == "__main__":
    arm.run_job = run_job
    arm.main(Path(sys.argv[1]), Path(sys.argv[2]))
