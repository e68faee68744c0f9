"""The copy of the project that mutants are made in: .cache/mutants, with the shape that it installs in.

mutmut makes mutants of functions without a decorator, and reads its settings from pyproject.toml. So in the
copy `@property` above a function becomes `name = property(name)` below it, which means the same, and the
settings of ci/mutants.yaml follow those of the project. mutmut makes a copy of this copy in a folder
`mutants`, where each function stands beside all its mutants.
"""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from environment import ROOT

STAGE = ROOT / ".cache" / "mutants"
# Where mutmut keeps the mutants, the times of tests, and how each mutant ended.
MADE = STAGE / "mutants"
TIMES = MADE / "mutmut-stats.json"
# The files that the copy was made from.
STAMP = STAGE / "stamp"
EQUAL = ROOT / "tests" / "core" / "equal_mutants.yaml"
PARTS = ("fusion_core", "adapters", "patches")
# mutmut knows functions with these.
KNOWN = (["staticmethod"], ["classmethod"])
PYTEST = ("-p", "no:cacheprovider", "-p", "mutants_order")
LEAVE = shutil.ignore_patterns("__pycache__", "*.pyc", EQUAL.name)


def plain_functions(source: str) -> str:
    """Return a source in which functions of a module or a class have no decorators, and mean the same."""
    lines = source.splitlines(keepends=True)
    for function in reversed(list(_functions(ast.parse(source).body))):
        decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
        if not decorators or decorators in KNOWN:
            continue
        value = function.name
        for decorator in reversed(decorators):
            value = f"{decorator}({value})"
        lines.insert(function.end_lineno or 0, f"{' ' * function.col_offset}{function.name} = {value}\n")
        del lines[function.decorator_list[0].lineno - 1 : function.lineno - 1]
    return "".join(lines)


def _functions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef]:
    for node in body:
        if isinstance(node, ast.FunctionDef):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node.body)


def source_hash(settings: dict[str, Any]) -> str:
    """Return a hash of every file that goes into the copy, and of the settings."""
    total = hashlib.sha256(project(settings).encode())
    for name in ("fse_patch", *settings["tests_read"]):
        for path in sorted(_files(ROOT / name)):
            total.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return total.hexdigest()


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    names = [p.name for p in path.iterdir()]
    leave = LEAVE(str(path), names)
    for name in names:
        # A second checkout links the parts into the package.
        if name not in leave and not (path / name).is_symlink():
            yield from _files(path / name)


def stage(settings: dict[str, Any], keep: bool) -> bool:
    """Make the copy, and return whether it had to be made: it stays where it was made of the same files.

    With ``keep``, what is known of mutants stays in any case.
    """
    stamp = source_hash(settings)
    if STAMP.is_file() and STAMP.read_text() == stamp:
        return False
    left = {path.relative_to(MADE): path.read_bytes() for path in _kept()} if keep else {}
    shutil.rmtree(STAGE, ignore_errors=True)
    for name, content in left.items():
        (MADE / name).parent.mkdir(parents=True, exist_ok=True)
        (MADE / name).write_bytes(content)
    MADE.mkdir(parents=True, exist_ok=True)
    package = STAGE / "fse_patch"
    shutil.copytree(ROOT / "fse_patch", package, ignore=shutil.ignore_patterns("__pycache__", *PARTS))
    for part in PARTS:
        shutil.copytree(ROOT / part, package / part, ignore=LEAVE)
    for path in package.glob("fusion_core/**/*.py"):
        path.write_text(plain_functions(path.read_text(encoding="utf-8")), encoding="utf-8")
    for name in settings["tests_read"]:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, STAGE / name, ignore=LEAVE)
        else:
            shutil.copy2(path, STAGE / name)
    (STAGE / "preloaded").write_text("\n".join(settings["preloaded"]) + "\n")
    (STAGE / "pyproject.toml").write_text(project(settings))
    STAMP.write_text(stamp)
    return True


def _kept() -> Iterator[Path]:
    if TIMES.is_file():
        yield TIMES
    yield from MADE.rglob("*.py.meta")


def left_out(settings: dict[str, Any]) -> list[str]:
    """Return pytest's arguments for the tests that do not run."""
    return [f"--deselect={test}" for group in settings["left_out"] for test in group["tests"]]


def project(settings: dict[str, Any]) -> str:
    """Return pyproject.toml with the settings of mutmut, whose values are the same in JSON and TOML."""
    table = settings["mutmut"] | {"also_copy": settings["tests_read"], "preload_modules_file": "preloaded"}
    table |= {"pytest_add_cli_args_test_selection": settings["tests"]}
    table |= {"pytest_add_cli_args": [*PYTEST, *left_out(settings)]}
    lines = [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    return (ROOT / "pyproject.toml").read_text(encoding="utf-8") + "\n".join(
        ["", "[tool.mutmut]", *lines, ""]
    )
