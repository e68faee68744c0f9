"""Holds together what `fse-patch plan -- COMMAND` says and what the engine makes of the same words."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from fse_patch.cli.app import app


def planned(command: str, folder: Path, *options: str) -> dict[str, Any]:
    """What is said of a launch; {m} in it is the model."""
    words = shlex.split(command.format(m=folder))
    done = CliRunner().invoke(app, ["plan", str(folder), "--json", "--device", "cpu", *options, "--", *words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    runtime: dict[str, Any] = json.loads(done.stdout)["runtime"]
    return runtime


def differences(commands: list[str], folder: Path, found: list[dict[str, Any]]) -> list[str]:
    """What plan says otherwise than the engine, by command."""
    wrong = []
    for command, engine in zip(commands, found, strict=True):
        plan = planned(command, folder)
        said = (plan["reason"] or "ok", plan["served"] == "fused")
        if said != (engine["reason"], engine["reason"] == "ok"):
            wrong.append(f"{command}: plan {said}: {plan['detail']}; engine {engine}")
    return wrong
