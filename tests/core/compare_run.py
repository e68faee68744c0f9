"""A comparison of the servers of compare_parts.py, run as `fse-patch` runs a command.

python compare_run.py OUT FAULT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import typer

from fse_patch.cli import compare, ending
from fse_patch.fusion_core.engines import Bench
from fse_patch.lab.compare import client, files, servers
from fse_patch.lab.compare.run import FUSED, Job
from fse_patch.lab.free_port import free_port

PARTS = str(Path(__file__).with_name("compare_parts.py"))


def run(out: Path, fault: str) -> None:
    words = f"{PARTS} client {{folder}}/{{file}} {{requests}} {out} {fault}"
    load = client.Load((1, 2), 2, 16, 4, 30.0)
    job = Job("vllm", Bench(file="-", words=words), out.parent, 200, True, load)
    port = free_port()

    def opened(name: str, folder: Path) -> Any:
        which = "fused" if name == FUSED and fault != "not-fused" else "stock"
        command = [sys.executable, PARTS, "serve", str(port), which, str(out), fault]
        return servers.started(name, command, os.environ, port, folder / "log", 30.0)

    with compare.told_when_ended():
        report = compare.compared(job, opened, {"command": "stand-ins"})
        files.write(out, report, picture=False)
    if not report["ok"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(run)
    ending.run(typer.main.get_command(app), sys.argv[1:])
