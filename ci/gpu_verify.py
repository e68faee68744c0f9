"""Small checkpoints through `verify` on a GPU, every mode of a fused layer in one run.

    python ci/gpu_verify.py ENGINE OUT [--fp8 FOLDER] [--mixed FOLDER] [--only GROUP ...]

In an environment with a CUDA build of the engine, transformers and fse_patch. OUT gets the checkpoints, the
tables that choose the modes, and a report for each job. FOLDER is what `benchmarks/checkpoint.py --quant
fp8-block` wrote, for --mixed `--quant fp8-routed`. The arms of a group run side by side. Exit status 1 if a
job fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from gpu_groups import FP8, GROUPS, MIXED, Group

from fse_patch.adapters.patching import guards, ledger
from fse_patch.adapters.refusals import SHARED_GATE
from fse_patch.cli.verify import vocab_size
from fse_patch.fusion_core.checkpoint.sources import read_json
from fse_patch.fusion_core.decision.decide import decide_roles
from fse_patch.fusion_core.decision.outcome import Merged, Stock, paired
from fse_patch.fusion_core.forward.tuned import Situation
from fse_patch.lab import decode_arm, tune, verify

LIMIT = 560.0


def table(
    engine: str, release: str, device: str, group: Group, decisions: Sequence[Merged]
) -> dict[str, Any]:
    """Write a tuned table that has the group's modes for the layers of ``decisions``."""
    rows = {}
    for decision in decisions:
        moe = decision.moe
        situation = Situation.of(
            moe.layout,
            group.gpus,
            engine=engine,
            release=release,
            backend=group.backend,
            device=device,
            dtype=group.dtype,
            scoring=moe.routing.scoring,
            gated=moe.shared_weight == SHARED_GATE,
            quant=group.quant,
        )
        held = asdict(situation)
        head = {name: held.pop(name) for name in tune.HEAD}
        rows[situation] = {**held, **group.choice}
    return {**head, "versions": {}, "measured": "by hand, to verify every mode", "rows": list(rows.values())}


def run(engine: str, name: str, group: Group, folders: Mapping[str, Path], out: Path) -> list[dict[str, Any]]:
    """Return the reports of a group's jobs, in their order."""
    jobs = []
    for recipe, arguments in group.jobs.values():
        folder = folders[recipe]
        vocab = vocab_size(read_json(folder / "config.json"), folder)
        decision = decide_roles(folder, engine)["main"]
        if group.paired:
            decision = paired(decision)
        if isinstance(decision, Stock):
            sys.exit(f"{folder} does not fuse: {decision.reason.code}: {decision.reason.detail}")
        jobs.append(verify.VerifyJob(folder, (decision,), vocab, group.dtype, arguments))
    release = guards.engine_version(ledger.load(engine)).partition("+")[0]
    # By itself an engine may pair.
    env = {**os.environ, "FSE_PATCH_LAYOUT": "merged", **group.env}
    if not group.paired:
        held = table(engine, release, decode_arm.device(), group, [job.decisions[0] for job in jobs])
        tuned = out / f"{engine}_{name}.yaml"
        tuned.write_text(yaml.safe_dump(held))
        env["FSE_PATCH_TUNED"] = str(tuned)
    with ThreadPoolExecutor(2) as pool:
        arms = pool.map(
            lambda fused: verify.run_arm(
                engine, jobs, fused, {**env, "VLLM_CACHE_ROOT": str(out / f"cache_{fused}")}, LIMIT
            ),
            (False, True),
        )
    return [
        {"engine": engine, "engine_version": release, **verify.judge(job, stock, fused)}
        for job, stock, fused in zip(jobs, *arms, strict=True)
    ]


def line(report: Mapping[str, Any]) -> str:
    """Return a report in words."""
    if "mean_abs_logprob_diff" not in report:
        return f"FAILED {'; '.join(report['failures'])}\n{report.get('log', '')[-2000:]}"
    noises = ", ".join(f"{name} {mean:.4f}" for name, mean in report["stock_noises"].items())
    canary = ", ".join(str(role.get("canary", {}).get("state")) for role in report["roles"])
    return (
        f"{'passed' if report['passed'] else 'FAILED'}: {report['mean_abs_logprob_diff']:.4f} off, "
        f"{report['mean_abs_answer_diff']:.4f} in {report['answer_tokens']} steps of answers; noises "
        f"{noises}, control {report['control_diff']:.3f}; {report['calls_by_mode']}, captured "
        f"{report['captured_by_mode']}; "
        f"canary {canary}; {'; '.join(report['failures'])}"
    )


def passes(
    engine: str,
    name: str,
    group: Group,
    folders: Mapping[str, Path],
    out: Path,
    told: Callable[[Mapping[str, Any]], str] | None = None,
) -> bool:
    """Run a group, print and keep the report of each job; return whether all passed.

    Args:
        told: what a second line says of a report.
    """
    passed = True
    for job, report in zip(group.jobs, run(engine, name, group, folders, out), strict=True):
        print(f"{engine} {name} {job}: {line(report)}", flush=True)
        if told is not None:
            print(f"  {told(report)}", flush=True)
        report.pop("log", None)
        report["checkpoint"] = Path(report["checkpoint"]).name
        (out / f"{engine}_{name}_{job}.json").write_text(json.dumps(report, indent=2) + "\n")
        passed &= report["passed"]
    return passed


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("engine", choices=GROUPS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--fp8", type=Path, help="an FP8 checkpoint; its groups are left out without it")
    parser.add_argument("--mixed", type=Path, help="one with a bfloat16 shared expert; likewise")
    parser.add_argument("--only", nargs="*", default=[], help="these groups alone")
    parser.add_argument("--jobs", nargs="*", default=[], help="these jobs of theirs alone")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    given = {recipe: folder for recipe, folder in ((FP8, args.fp8), (MIXED, args.mixed)) if folder}
    absent = {FP8, MIXED} - given.keys()
    count = torch.cuda.device_count()
    groups = {
        name: group
        for name, group in GROUPS[args.engine].items()
        if not absent & group.recipes and group.gpus <= count
    }
    if unknown := set(args.only) - groups.keys():
        parser.error(
            f"--only {sorted(unknown)[0]}: not among {', '.join(groups)}; "
            f"FP8 needs --fp8 or --mixed, others two GPUs"
        )
    groups = {name: groups[name] for name in args.only or groups}
    if args.jobs:
        kept = {
            name: {job: group.jobs[job] for job in args.jobs if job in group.jobs}
            for name, group in groups.items()
        }
        groups = {name: replace(group, jobs=kept[name]) for name, group in groups.items() if kept[name]}
    from checkpoints import gpu
    from checkpoints.make import make

    gpu.enlarge()
    recipes = {recipe for group in groups.values() for recipe in group.recipes} - given.keys()
    folders = {recipe: make(recipe, args.out / recipe, "bfloat16") for recipe in sorted(recipes)} | given
    failed = [
        name for name, group in groups.items() if not passes(args.engine, name, group, folders, args.out)
    ]
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
