"""What `fse-patch verify` asks of a SGLang scheduler, through SGLang's own ``collective_rpc``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import wrapt

from .. import model_process

SCHEDULER = "sglang.srt.managers.scheduler"


def fse_report(self: Any, folder: str) -> None:
    """Leave `model_process.report` in ``folder``."""
    from sglang.srt.distributed.parallel_state import get_pp_group

    report = model_process.report(get_pp_group().rank_in_group)
    part = Path(folder) / f"{report['pid']:010}.part"
    part.write_text(json.dumps(report))
    # Renamed into place: who waits for it must not read a half.
    part.replace(part.with_suffix(".json"))


def fse_reset(self: Any) -> None:
    """Forget the calls of SGLang's own warm-up."""
    model_process.reset()


def fse_control(self: Any, factor: float) -> None:
    """Multiply the first shared slot by ``factor``."""
    model_process.control(factor)


def fse_head(self: Any, state: str) -> None:
    """Let the LM head run as `model_process.head` says."""
    model_process.head(state)


def fse_jitter(self: Any, seed: int) -> None:
    """Give the embedding the noise of one more rounding."""
    model_process.jitter(self.tp_worker.model_runner.model.modules(), seed)


def extend(scheduler: Any) -> None:
    """Give the Scheduler class what the calls name."""
    for method in (fse_report, fse_reset, fse_control, fse_head, fse_jitter):
        setattr(scheduler.Scheduler, method.__name__, method)


def install() -> None:
    """Extend the scheduler of this process when its module is imported."""
    wrapt.register_post_import_hook(extend, SCHEDULER)
