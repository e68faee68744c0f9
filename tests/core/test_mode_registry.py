"""A mode is a line of the registry and a file with its function; neither is without the other."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from fse_patch.fusion_core.forward import mode_registry
from fse_patch.fusion_core.forward.mode_registry import MODES, ExecutionMode

FOLDER = Path(mode_registry.__file__).with_name("modes")
ARGUMENTS = ["execution", "hidden_states", "logits"]


def problems(names: Iterable[str], folder: Path) -> list[str]:
    """What lacks its other half. Files are read and not imported: some need Triton."""
    files = {file.stem: file for file in folder.glob("*.py") if file.stem != "__init__"}
    problems = [f"{name} has no file" for name in names if name not in files]
    for name, file in sorted(files.items()):
        if name not in names:
            problems.append(f"{file.name} has no line")
        functions = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
        if ARGUMENTS not in [[a.arg for a in f.args.args] for f in functions if f.name == "run"]:
            problems.append(f"{file.name} has no run({', '.join(ARGUMENTS)})")
    return problems


def test_each_line_has_a_file_and_each_file_a_line() -> None:
    assert problems(list(MODES), FOLDER) == []
    assert [mode.name for mode in MODES.values()] == list(MODES)


def test_control_what_lacks_its_other_half_is_seen(tmp_path: Path) -> None:
    for name in MODES:
        (tmp_path / f"{name}.py").write_text((FOLDER / f"{name}.py").read_text())
    assert problems(list(MODES), tmp_path) == []
    (tmp_path / "fused.py").rename(tmp_path / "other.py")
    (tmp_path / "split.py").write_text("def run(execution, states):\n    pass\n")
    assert problems(list(MODES), tmp_path) == [
        "fused has no file",
        "other.py has no line",
        "split.py has no run(execution, hidden_states, logits)",
    ]


@pytest.mark.parametrize(
    ("mode", "slots", "tokens", "runs"),
    [
        ("small", 1, 32, True),
        ("small", 1, 33, False),
        ("small", 4, 1, True),
        ("once", 8, 16, True),
        ("once", 1, 17, False),
        ("fused", 8, 8192, True),
        ("split", 1, 8192, True),
        ("split", 2, 1, False),
    ],
)
def test_what_is_worth_measuring(mode: str, slots: int, tokens: int, runs: bool) -> None:
    assert MODES[mode].runs(slots, tokens) is runs


def test_a_mode_without_a_file_cannot_be_loaded() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"forward\.modes\.tiny"):
        ExecutionMode("tiny").load()


def test_the_registry_needs_no_torch() -> None:
    """Plans and tables name modes where there is none."""
    command = "import sys, {}; sys.exit('torch' in sys.modules)"
    statuses = [
        subprocess.run([sys.executable, "-c", command.format(name)], check=False).returncode
        for name in ("fse_patch.fusion_core.forward.mode_registry", "fse_patch.fusion_core.forward.router")
    ]
    # The second one is the control.
    assert statuses == [0, 1]
