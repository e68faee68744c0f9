"""The proof that a ROCm owner can complete, as one report to attach to an issue.

    python -m fse_patch.rocm CHECKPOINT --engine vllm [--out rocm-report.json]

It looks at AITER, in a process of its own because its kernels end the process on what they do not take, and
runs `fse-patch verify` and `fse-patch bench`, with FSE_PATCH_ALLOW_UNMEASURED=1. The exit status is that of
verify: a device on which fusing is slow is still right.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import doctor, settings
from .errors import FsePatchError
from .fusion_core.evidence.gather import read_evidence
from .patches import ENGINES
from .version import __version__

LINES = 40
LOOK = "import json; from fse_patch.rocm import aiter_report; print(json.dumps(aiter_report()))"
# Distributions that AITER has come in.
DISTRIBUTIONS = ("amd-aiter", "aiter")


def aiter_report() -> dict[str, Any]:
    """Return what of AITER this process may use, and why not the rest. Compiles kernels, on a GPU."""
    from importlib import metadata

    import torch

    from .fusion_core.kernels.aiter import probe
    from .fusion_core.kernels.aiter_check import CHECKS, failures, without

    report: dict[str, Any] = {"hip": torch.version.hip, "version": None, "usable": [], "faults": {}}
    for name in DISTRIBUTIONS:
        try:
            report["version"] = f"{name} {metadata.version(name)}"
            break
        except metadata.PackageNotFoundError:
            continue
    caps = probe()
    report["why"] = caps.why
    if not caps.why:
        device = torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu").device
        report["faults"] = failures(caps, device)
        caps = without(caps, report["faults"])
        report["usable"] = [name for name, _ in CHECKS if getattr(caps, name)]
        report["fused_moe"] = sorted(caps.moe_arguments)
    return report


def _child(arguments: list[str]) -> dict[str, Any]:
    """Run Python; the JSON that it ends with, or the end of what it said."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, settings.ALLOW_UNMEASURED: "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    result: dict[str, Any] = {"status": done.returncode}
    try:
        # Kernels that are compiled say so before.
        result["report"] = json.loads(done.stdout[max(0, done.stdout.find("{")) :])
    except ValueError:
        result["output"] = (done.stdout + done.stderr).splitlines()[-LINES:]
    return result


def checked(checkpoint: str, out: Path) -> None:
    """Look at what is given before anything runs: that takes minutes.

    Raises:
        FsePatchError: there is no such checkpoint, or the report could not be written.
    """
    read_evidence(Path(checkpoint).expanduser(), ENGINES[0])
    try:
        with out.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise FsePatchError(f"--out {out}: cannot be written: {error.strerror}") from None


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m fse_patch.rocm", description="Report on ROCm and AITER.")
    parser.add_argument("checkpoint", help="folder with config.json and safetensors files")
    parser.add_argument("--engine", required=True, choices=ENGINES)
    parser.add_argument("--out", type=Path, default=Path("rocm-report.json"))
    args = parser.parse_args(argv)
    try:
        checked(args.checkpoint, args.out)
    except FsePatchError as error:
        print(f"fse_patch.rocm: {error}", file=sys.stderr)
        return error.exit_status

    def run(command: str) -> dict[str, Any]:
        print(f"fse-patch {command} {args.checkpoint}", file=sys.stderr, flush=True)
        given = [command, args.checkpoint, "--engine", args.engine, "--json"]
        return _child(["-m", "fse_patch.cli.app", *given])

    report: dict[str, Any] = {
        "fse_patch": __version__,
        "doctor": doctor.examine(),
        "aiter": _child(["-c", LOOK]),
        "verify": run("verify"),
        "bench": run("bench"),
    }
    args.out.write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")
    print(f"{args.out}: written; attach it to an issue")
    return int(report["verify"]["status"])


if __name__ == "__main__":
    raise SystemExit(main())
