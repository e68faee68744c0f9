"""Holds together what `fse-patch plan -- COMMAND` says and what the engine makes of the same words."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from typer.testing import CliRunner

from fse_patch.cli.app import app


@contextmanager
def given(command: str, folder: str) -> Iterator[list[str]]:
    """The words of a launch, {m} in it the model, while the variables in front of it are set."""
    words = shlex.split(command.format(m=folder))
    number = next(n for n, word in enumerate(words) if "=" not in word)
    with mock.patch.dict(os.environ, dict(word.split("=", 1) for word in words[:number])):
        yield words[number:]


def decided(decision: dict[str, Any]) -> dict[str, Any]:
    """What an engine's decision says: the reason, "ok" where it fuses, and the layout then."""
    fuses = decision["reason"] == "ok"
    layout = decision["weight_layout"] if fuses else None
    return {"reason": decision["reason"], "layout": layout, "detail": decision["detail"]}


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
        said = (plan["reason"] or "ok", plan["served"] == "fused", plan["layout"])
        if said != (engine["reason"], engine["reason"] == "ok", engine.get("layout")):
            wrong.append(f"{command}: plan {said}: {plan['detail']}; engine {engine}")
    return wrong
