"""What an arm of an end-to-end measurement runs in SGLang's scheduler, the process that holds the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import wrapt

from .. import random_weights
from ..shared_sets import SharedSets
from . import worker

METHODS = "sglang.srt.layers.quantization.unquant"
SETS = SharedSets(0)


def bench_open(self: Any, file: str) -> None:
    """Draw weights, in place so that captured graphs see it, and say in ``file`` what is there."""
    model = self.tp_worker.model_runner.model
    report = random_weights.draw_model(model, SETS)
    for module in model.modules():
        if getattr(module, "_weight_fp32", None) is not None:
            module._weight_fp32.copy_(module.weight.data)
    room = {"requests": self.max_running_requests, "tokens": self.max_total_num_tokens}
    Path(file).write_text(json.dumps({**report, **room}))


def extend(scheduler: Any) -> None:
    """Give the Scheduler class what is called."""
    scheduler.Scheduler.bench_open = bench_open


def install(sets: int) -> None:
    """Share ``sets`` of experts, and extend the scheduler of this process when its module is imported."""
    SETS.number = sets
    SETS.install(METHODS)
    worker.install()
    wrapt.register_post_import_hook(extend, worker.SCHEDULER)
