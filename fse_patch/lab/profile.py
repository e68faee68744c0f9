"""Kernels of decode steps by time, stock against ours: an engine each, one after the other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import EngineError
from .arm_process import LOG_LINES, run_process
from .cause import with_cause
from .decode_arm import prompts

# The module that runs an arm, in the engine's process.
ARM = "fse_patch.lab.{engine}.profile_arm"
# Tokens of an answer beyond those of the window: streams begin one after the other, and end so.
MORE = 8


class ArmError(EngineError):
    """An arm has failed; ``log`` is the end of what it said."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True)
class ProfileJob:
    """What to look at.

    Args:
        window: streams, warm_up, steps, looker, as of `DecodeWindow`.
    """

    checkpoint: Path
    vocab: int
    window: Mapping[str, Any]
    engine_args: Mapping[str, Any] = field(default_factory=dict)

    def request(self) -> dict[str, Any]:
        """Return what an arm needs to run the job."""
        window = dict(self.window)
        return {
            "checkpoint": str(self.checkpoint),
            "prompts": prompts(window["streams"], self.vocab),
            "new_tokens": window["warm_up"] + window["steps"] + window["streams"] + MORE,
            "engine_args": dict(self.engine_args),
            "window": window,
        }


def profile(
    job: ProfileJob,
    engine: str,
    arms: Sequence[str],
    timeout: float,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, dict[str, Any]]:
    """Return what the first process of each arm has told: steps, rows, and what its roles ran.

    Args:
        arms: "stock", "ours", or both.

    Raises:
        ArmError: an arm has failed.
    """
    found: dict[str, dict[str, Any]] = {}
    for arm in arms:
        tell(f"{arm} {engine}: {job.checkpoint.name}")
        env = dict(os.environ)
        results, log, ending = run_process(engine, [job], arm == "ours", env, timeout, lambda _: None, ARM)
        result: dict[str, Any] = results[0] if results else {"error": f"the process {ending}"}
        if "error" in result:
            end = "\n".join(log.splitlines()[-LOG_LINES:])
            raise ArmError(f"{arm} arm: {with_cause(result['error'], log)}", end)
        found[arm] = result["workers"][0]
    return found


def beside(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each kernel: milliseconds and calls a step in each arm, the longest first."""
    names = dict.fromkeys(row["name"] for told in found.values() for row in told["rows"])
    made = []
    for name in names:
        row: dict[str, Any] = {"name": name}
        for arm, told in found.items():
            here = [r for r in told["rows"] if r["name"] == name]
            row[f"{arm}_ms"] = sum(r["seconds"] for r in here) * 1e3 / told["steps"]
            row[f"{arm}_calls"] = sum(r["calls"] for r in here) / told["steps"]
        made.append(row)
    return sorted(made, key=lambda row: -max(row[f"{arm}_ms"] for arm in found))


def lines(rows: Iterable[Mapping[str, Any]], arms: Sequence[str], most: int) -> list[str]:
    """Return the longest ``most`` rows as a table, and the sums of all."""
    rows = list(rows)
    head = "".join(f"{f'{arm} ms':>12}{'calls':>8}" for arm in arms)
    made = [f"{head}  a step"]
    for row in rows[:most]:
        made.append(
            "".join(f"{row[f'{a}_ms']:12.4f}{row[f'{a}_calls']:8.1f}" for a in arms) + f"  {row['name'][:90]}"
        )
    if rest := rows[most:]:
        made.append(
            "".join(f"{sum(r[f'{a}_ms'] for r in rest):12.4f}{'':8}" for a in arms) + f"  {len(rest)} more"
        )
    made.append("".join(f"{sum(r[f'{a}_ms'] for r in rows):12.4f}{'':8}" for a in arms) + "  in all")
    return made
