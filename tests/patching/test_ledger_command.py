"""``fse-patch patches``."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from fse_patch.cli.patches import command

from .conftest import Toy


def run(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


def test_json(engine: Toy) -> None:
    code, output = run("--json", "--engine", "vllm")
    (book,) = json.loads(output)["engines"]
    (patch,) = book["patches"]
    assert (code, book["engine"], book["installed"], patch["guard"]) == (0, "vllm", "1.0", "ok")
    assert {"id", "target", "versions", "why", "upstream", "remove_when"} < set(patch)


def test_text(engine: Toy) -> None:
    code, output = run()
    assert code == 0
    for part in ("vllm: 1.0 installed", "core:greet: ok", f"{engine.name}.core:greet", "none: a test"):
        assert part in output


@pytest.mark.parametrize(
    ("change", "state"),
    [("'hallo'", "none of 1 known sources"), (None, "version.untested"), ("", "not installed")],
)
def test_guard_state(engine: Toy, change: str | None, state: str) -> None:
    if change:
        engine.write("core.py", f"def greet():\n    return {change}\n")
    elif change is None:
        info = engine.root / f"{engine.name}-1.0.dist-info" / "METADATA"
        info.write_text(info.read_text().replace("Version: 1.0", "Version: 0.5"))
    else:
        engine.ledger("core:greet", distributions=["absent"])
    assert state in run()[1]


def test_shipped_ledgers_render() -> None:
    code, output = run()
    assert code == 0
    assert "vllm" in output
