"""What a comparison found, as plain data: for JSON, the page and the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import table
from .run import Arm, Job, agreement


def report_of(job: Job, arms: Sequence[Arm], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return model, engine, ok, speed, answers_words, rows, answers, servers and facts.

    Args:
        facts: what was run, by names in words.
    """
    rows = table.rows(*(arm.levels for arm in arms))
    answers = agreement(job, arms)
    return {
        "model": job.checkpoint.resolve().name,
        "engine": job.engine,
        "ok": answers.holds,
        "speed": table.sentence(rows),
        "answers_words": str(answers),
        "rows": rows,
        "answers": answers.to_dict(),
        "servers": [
            {"name": arm.name, "fused": arm.fused, "said": arm.said, "start_seconds": arm.start_seconds}
            for arm in arms
        ],
        "facts": {
            **facts,
            "streams": ", ".join(map(str, job.load.streams)),
            "requests of each stream": job.load.rounds,
            "tokens of a prompt": job.load.input,
            "tokens of an answer": job.load.output,
        },
    }
