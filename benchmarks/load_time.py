"""How long vLLM takes to load a checkpoint: stock, fused without the canary, and fused as users run it.

    FSE_PATCH_ALLOW_UNMEASURED=1 python benchmarks/load_time.py CHECKPOINT --out FILE.json [--repeats 5]

One process, its page cache and Triton's cache warm after a first round that does not count; then the arms in
turn. The time is that of the loader's `load_model`, behind which the canary runs, up to an idle GPU.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fse_patch
from fse_patch import __version__, runtime
from fse_patch.adapters import prove
from fse_patch.adapters.load import ROLE

# What FSE_PATCH_VERIFY says in each arm; None is stock.
ARMS: dict[str, str | None] = {"stock": None, "fused, verify off": "off", "fused, verify sample": "sample"}
PARTS: dict[str, float] = {}


def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, adding the seconds that it takes to PARTS."""

    def call(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.synchronize()
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            torch.cuda.synchronize()
            PARTS[name] = PARTS.get(name, 0.0) + time.perf_counter() - start

    return call


def load(arm: str, checkpoint: str, engine_args: dict[str, Any]) -> dict[str, Any]:
    """Load once; what it took, and what the canary says."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.distributed.parallel_state import model_parallel_is_initialized
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.v1.worker.workspace import init_workspace_manager

    if (verify := ARMS[arm]) is not None:
        os.environ["FSE_PATCH_VERIFY"] = verify
        fse_patch.apply("vllm")
    try:
        # Configurations remember the layers that were built under them: each load has its own.
        config = EngineArgs(
            model=checkpoint, skip_tokenizer_init=True, enforce_eager=True, **engine_args
        ).create_engine_config()
        with set_current_vllm_config(config):
            if not model_parallel_is_initialized():
                init_distributed_environment(1, 0, "tcp://127.0.0.1:29517", 0)
                initialize_model_parallel(1, 1)
                init_workspace_manager(torch.device("cuda"))
            PARTS.clear()
            torch.cuda.synchronize()
            start = time.perf_counter()
            model = get_model_loader(config.load_config).load_model(
                vllm_config=config, model_config=config.model_config
            )
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        fused_role = getattr(model, ROLE, None)
        if (fused_role is None) != (verify is None):
            raise SystemExit(f"{arm}: the model is not what this arm is about")
        reading = {"seconds": seconds, "parts": dict(PARTS)}
        if fused_role is not None:
            reading |= {
                "canary": fused_role.loaded.proof.to_dict(),
                "compared": fused_role.compared,
                "slots": fused_role.audit.slots_loaded,
            }
        return reading
    finally:
        if verify is not None:
            fse_patch.remove("vllm")
        runtime.clear()
        model = fused_role = config = None
        gc.collect()
        torch.cuda.empty_cache()


def summary(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Medians of the arms, and what the proof adds, round by round."""

    def of(arm: str) -> list[float]:
        return [entry[arm]["seconds"] for entry in rounds]

    stock, off, sample = (of(arm) for arm in ARMS)
    return {
        "median_seconds": {arm: statistics.median(of(arm)) for arm in ARMS},
        "spread_seconds": {arm: max(of(arm)) - min(of(arm)) for arm in ARMS},
        "sample_minus_stock": statistics.median(a - b for a, b in zip(sample, stock, strict=True)),
        "sample_minus_off": statistics.median(a - b for a, b in zip(sample, off, strict=True)),
        "off_minus_stock": statistics.median(a - b for a, b in zip(off, stock, strict=True)),
        "sample_over_stock": statistics.median(a / b for a, b in zip(sample, stock, strict=True)),
    }


def write_csv(report: dict[str, Any], path: Path) -> None:
    """A line for each arm."""
    found = report["summary"]
    added = {"fused, verify off": "off_minus_stock", "fused, verify sample": "sample_minus_stock"}
    with path.open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(
            [
                "device",
                *report["versions"],
                "commit",
                "gib",
                "rounds",
                "arm",
                "median_s",
                "spread_s",
                "added_s",
            ]
        )
        for arm, seconds in found["median_seconds"].items():
            out.writerow(
                [
                    report["device"],
                    *report["versions"].values(),
                    report["commit"],
                    f"{report['gib']:.2f}",
                    len(report["rounds"]),
                    arm,
                    f"{seconds:.3f}",
                    f"{found['spread_seconds'][arm]:.3f}",
                    f"{found[added[arm]]:.3f}" if arm in added else "0",
                ]
            )


def main() -> None:
    """Run the command."""
    import vllm

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--engine-args", type=json.loads, default={}, help="JSON object")
    parser.add_argument("--commit", default="unknown", help="of the code that runs")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    prove.reference = timed("canary: reference", prove.reference)
    prove.Prover.output = timed("canary: forward", prove.Prover.output)  # type: ignore[method-assign]
    first = {arm: load(arm, args.checkpoint, args.engine_args) for arm in ARMS}
    print("first round:", json.dumps(first), flush=True)
    rounds = []
    for number in range(args.repeats):
        # Every other round backwards, so that no arm always follows the same one.
        order = list(ARMS) if number % 2 == 0 else list(ARMS)[::-1]
        rounds.append({arm: load(arm, args.checkpoint, args.engine_args) for arm in order})
        print(json.dumps(rounds[-1]), flush=True)
    size = sum(file.stat().st_size for file in Path(args.checkpoint).glob("*.safetensors"))
    report = {
        "device": torch.cuda.get_device_name(),
        "commit": args.commit,
        "versions": {"fse_patch": __version__, "vllm": vllm.__version__, "torch": torch.__version__},
        "gib": size / 2**30,
        "summary": summary(rounds),
        "first_round": first,
        "rounds": rounds,
    }
    args.out.write_text(json.dumps(report, indent=1))
    write_csv(report, args.out.with_suffix(".csv"))
    print(json.dumps(report["summary"], indent=1))


if __name__ == "__main__":
    main()
