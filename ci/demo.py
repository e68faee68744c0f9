"""The main job in one command: tiny models of the four families, stock against fused, on the real engine.

    .venvs/<engine environment>/bin/python ci/demo.py

Makes random checkpoints, runs each in the stock and in the fused engine on the same tokens, and prints one
table.
Exit status 1 if any of them does not pass.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from tiny_checkpoints import make

from fse_patch import verify
from fse_patch.adapters import guards, ledger
from fse_patch.fusion_core.decide import decide_roles

ENGINE = "vllm"
VOCAB = 256
# Linear attention has no float32 kernel on a CPU: those two families run as they are served there.
LINEAR = {"mamba_ssm_cache_dtype": "float32"}
MODELS = [
    ("Qwen2-MoE", "qwen2_moe_wide4", "float32", {}),
    ("Qwen3-Next", "qwen3_next", "bfloat16", LINEAR),
    ("Qwen3.5", "qwen3_5_vl_3d", "bfloat16", {**LINEAR, "language_model_only": True}),
    ("GLM-4", "glm4_moe_scale", "float32", {}),
]
# One process each, no network; the cache saves the engine's inspection of model classes the next time.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CACHE_ROOT": str(Path(__file__).parents[1] / ".cache" / "demo"),
}


def main() -> int:
    """Run the demo; returns its exit status."""
    console, begun = Console(), time.monotonic()
    version = guards.engine_version(ledger.load(ENGINE))

    def say(line: str) -> None:
        console.print(f"[{time.monotonic() - begun:4.0f} s] {line}", markup=False, highlight=False)

    with tempfile.TemporaryDirectory(prefix="fse_patch_demo_") as folder:
        jobs = []
        for _, recipe, dtype, engine_args in MODELS:
            say(f"writing a tiny random {recipe}, {dtype}")
            checkpoint = make(recipe, Path(folder) / recipe, dtype)
            decision = decide_roles(checkpoint, ENGINE)["main"]
            jobs.append(verify.VerifyJob(checkpoint, (decision,), VOCAB, dtype, engine_args))
        reports = verify.verify(jobs, ENGINE, version, {**os.environ, **ENVIRONMENT}, progress=say)

    # Narrow enough for 80 columns.
    title = f"vLLM {version} on CPU, teacher-forced: fused against stock"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, collapse_padding=True, pad_edge=False)
    headers = ["family", "dtype", "layers\nfused", "slots\nloaded", "log-prob\ndifference"]
    headers += ["noise", "control", "verdict"]
    for column in headers:
        table.add_column(
            column, justify="left" if column in ("family", "dtype", "verdict") else "right", no_wrap=True
        )
    for (family, _, dtype, _), job, report in zip(MODELS, jobs, reports, strict=True):
        if "mean_abs_logprob_diff" not in report:
            table.add_row(family, dtype, "", "", "", "", "", "FAILED")
            continue
        table.add_row(
            family,
            dtype,
            f"{len(report['fused_layers'])} of {len(job.decisions[0].moe_layers)}",
            str(report["slots_loaded"]),
            f"{report['mean_abs_logprob_diff']:.1e}",
            f"{report['stock_noise']:.1e}",
            f"{report['control_diff']:.1e}",
            "equal" if report["passed"] else "FAILED",
        )
    console.print(table)
    console.print(
        "difference: mean over tokens, in nats. noise: stock against itself.\n"
        "control: a shared slot's weight changed on purpose, which must be seen.",
        markup=False,
    )
    for report in reports:
        for failure in report["failures"]:
            console.print(f"{report['checkpoint']}: {failure}", markup=False)
        if "log" in report:
            console.print(report["log"], markup=False)
    return 0 if all(report["passed"] for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
