"""The arm of the tests: its jobs can ask for a deliberate fault in our own code, or for steps; see `live`.

The model is in a process that SGLang spawns. It runs this module too, and finds the fault in its environment.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import wrapt

from fse_patch.adapters import save
from fse_patch.adapters.load import RoleLoader
from fse_patch.adapters.sglang import build, either_layout
from fse_patch.adapters.sglang.pair_layer import BlockLayer
from fse_patch.fusion_core.weights.remap import SlotTensor
from fse_patch.lab import model_process
from fse_patch.lab.sglang import verify_arm, worker

from ..head_faults import HEAD_FAULTS
from ..pair_faults import UNPROVED, faults
from ..slot_faults import SLOT_FAULTS, honest_write
from . import live

VARIABLE = "FSE_PATCH_TEST_FAULT"
honest_run = verify_arm.run_job
PAIR_FAULTS = faults(BlockLayer)


def deaf(self: RoleLoader, part: SlotTensor) -> None:
    """An update leaves the slots as they are."""
    if self.role.audit.loads == 0:
        honest_write(self, part)
    else:
        self.role.audit.wrote(part)


FAULTS: dict[str, Callable[[], Any]] = {
    **SLOT_FAULTS,
    **PAIR_FAULTS,
    **HEAD_FAULTS,
    "scale_in_the_slot": lambda: patch.object(build, "output_scale", lambda *_: 1.0),
    "balanced_anyway": lambda: patch.object(either_layout, "_spread", lambda *_: iter(())),
    "saves_anyway": lambda: patch.object(save, "constructed", list),
    "deaf_to_updates": lambda: patch.object(RoleLoader, "_write", deaf),
    "patch_never_fired": lambda: patch.object(build, "start_of", lambda *_: None),
    "control_without_effect": lambda: patch.object(model_process, "control", lambda _: None),
}


def without_detokenizer() -> None:
    """Start no process of SGLang's for text: tests ask for token ids, and nothing is ever sent to it."""
    from sglang.srt.entrypoints.engine import Engine

    name = "_launch_detokenizer_subprocesses"
    assert hasattr(Engine, name)
    setattr(Engine, name, classmethod(lambda cls, **_: ([], [])))


def is_proved(fault: str) -> bool:
    """Whether it is the proof that has to see a fault, and not the answers."""
    return fault in PAIR_FAULTS and not fault.startswith(UNPROVED)


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    os.environ[VARIABLE] = job["engine_args"].pop("fault", "")
    # The log-probabilities have to show a fault by themselves: the canary would stop most of them before.
    proved = not os.environ[VARIABLE] or is_proved(os.environ[VARIABLE])
    os.environ["FSE_PATCH_VERIFY"] = "sample" if proved else "off"
    result = live.run_steps(job) if "steps" in job["engine_args"] else honest_run(job)
    return {**result, "arm_pid": os.getpid()}


if __name__ == "__mp_main__":
    worker.install()
    wrapt.register_post_import_hook(live.extend, worker.SCHEDULER)
    if fault := os.environ.get(VARIABLE):
        FAULTS[fault]().start()
if __name__ == "__main__":
    without_detokenizer()
    verify_arm.run_job = run_job
    verify_arm.main(Path(sys.argv[1]), Path(sys.argv[2]))
