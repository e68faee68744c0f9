"""Stock and fused engines in turn, a process each, and what may be said of the ratios.

    python benchmarks/alternate.py FOLDER --rounds 5 --raw raw.json --csv end_to_end.csv [-- OPTIONS]

OPTIONS go to the script of an arm, end_to_end.py. Rounds alternate in order. Every process that ends is kept
in the raw file, and a second call goes on with it, so that a run may be cut in parts. The ratio of a round is
stock over fused; "again" compares each stock process with the one before it.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fse_patch.fusion_core.measure import ratio

ARMS = ("stock", "fused")


def arm(
    name: str, number: int, command: Sequence[str], engine: str, limit: float, out: Path
) -> dict[str, Any]:
    """What the process of ``command`` measured, and wrote to ``out``.

    Raises:
        SystemExit: it failed, or took longer than ``limit`` seconds; the end of what it said is shown.
    """
    begun = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "FSE_PATCH": engine if name == "fused" else "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        raise SystemExit(f"{name} {number}: not done after {limit:.0f} s") from None
    if done.returncode:
        raise SystemExit(f"{name} {number}: status {done.returncode}\n{done.stdout[-3000:]}")
    found = json.loads(out.read_text())
    out.unlink()
    steps = {streams: step["ms"] for streams, step in found["steps"].items()}
    shown = ", ".join(f"{streams}: {ms:.3f}" for streams, ms in steps.items())
    print(f"{name} {number} ({time.perf_counter() - begun:.0f} s), ms a step: {shown}", flush=True)
    return {"arm": name, "round": number, **{k: v for k, v in found.items() if k != "arm"}}


def table(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each number of streams, over the rounds in which both arms ended."""
    both = {name: {run["round"]: run["steps"] for run in runs if run["arm"] == name} for name in ARMS}
    rounds = sorted(both["stock"].keys() & both["fused"].keys())
    rows = []
    for streams in both["stock"][rounds[0]] if rounds else ():
        stock, fused = ([both[name][number][streams]["ms"] for number in rounds] for name in ARMS)
        found = ratio(stock, fused)
        row = {
            "streams": int(streams),
            "rounds": len(rounds),
            "stock_ms": statistics.median(stock),
            "fused_ms": statistics.median(fused),
            "ratio": found.median,
            "lower": found.lower,
        }
        if len(rounds) > 1:
            row["again"] = ratio(stock[:-1], stock[1:]).median
        rows.append(row)
    return rows


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--script", type=Path, default=Path(__file__).with_name("end_to_end.py"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--raw", type=Path, required=True)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--commit", default="")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no process after so many")
    parser.add_argument("--limit", type=float, default=300, help="most seconds of a process")
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    args, options = parser.parse_args(given[:end]), given[end + 1 :]
    begun = time.perf_counter()
    runs: list[dict[str, Any]] = json.loads(args.raw.read_text()) if args.raw.exists() else []
    done = {(run["arm"], run["round"]) for run in runs}
    for number in range(args.rounds):
        for name in ARMS if number % 2 == 0 else ARMS[::-1]:
            if (name, number) in done or time.perf_counter() - begun > args.seconds:
                continue
            out = args.raw.with_suffix(".arm")
            command = [sys.executable, str(args.script), name, str(args.folder), "--out", str(out), *options]
            runs.append(arm(name, number, command, args.engine, args.limit, out))
            args.raw.write_text(json.dumps(runs))
    rows = table(runs)
    for row in rows:
        print(" ".join(f"{k}={v:.4g}" for k, v in row.items()))
    if args.csv and rows:
        head = {
            "model": args.folder.name,
            "engine": args.engine,
            "commit": args.commit,
            **runs[0].get("versions", {}),
        }
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*head, *rows[0]])
            writer.writeheader()
            writer.writerows({**head, **{k: round(v, 4) for k, v in row.items()}} for row in rows)


if __name__ == "__main__":
    main()
