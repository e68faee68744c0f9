"""`fse-patch plan` in the process that asks, and checkpoints to ask about."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from fse_patch.cli.app import app

from .golden import ROWS, write_row

SHAPES = Path(__file__).parents[2] / "benchmarks" / "shapes"
BEST = {"vllm": "0.26.0", "sglang": "0.5.17"}
GOLDEN = {row["id"]: row for row in ROWS}
COMMANDS = {"vllm": "vllm serve M", "sglang": "python -m sglang.launch_server --model-path M"}


def plan(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """In this process: a hundred of them would take minutes to start."""
    clean = {name: None for name in os.environ if name.startswith("FSE_PATCH")}
    done = CliRunner().invoke(app, ["plan", str(folder), "--json", *arguments], env=clean)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, json.loads(done.stdout)


def checkpoint(name: str, out: Path) -> Path:
    """A row of golden/, or the config of a shape that was measured."""
    return write_row(out, GOLDEN[name]) if name in GOLDEN else SHAPES / name
