"""Installed definitions, read without importing the engine, and a short hash of each, its fingerprint.

The hash is of the syntax tree without docstrings and comments. The tree is written out here, because
``ast.dump`` differs between Python releases, and a fingerprint has to hold on all.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from ...errors import FsePatchError

SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
# Load, Store and Del follow from the place in the tree; the others are comments or typing-only.
_SKIPPED_FIELDS = {"ctx", "kind", "type_comment", "type_ignores"}


def _is_docstring(node: ast.AST) -> bool:
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _joined(values: Sequence[ast.AST]) -> list[ast.AST]:
    """Merge adjacent literals of an f-string: how they are cut up differs between Python releases."""
    parts: list[ast.AST] = []
    for part in values:
        last = parts[-1] if parts else None
        if isinstance(part, ast.Constant) and isinstance(last, ast.Constant):
            parts[-1] = ast.Constant(value=str(last.value) + str(part.value))
        elif not (isinstance(part, ast.Constant) and part.value == ""):
            parts.append(part)
    return parts


def _dump(value: object) -> str:
    if isinstance(value, list):
        return "[" + ",".join(map(_dump, value)) + "]"
    if not isinstance(value, ast.AST):
        return ascii(value)  # repr depends on the interpreter's Unicode tables
    fields = []
    for name in sorted(set(value._fields) - _SKIPPED_FIELDS):
        field = getattr(value, name, None)
        if name == "body" and isinstance(value, SCOPES) and field and _is_docstring(field[0]):
            field = field[1:]
        if name == "values" and isinstance(value, ast.JoinedStr):
            field = _joined(value.values)
        empty_spec = name == "format_spec" and isinstance(field, ast.JoinedStr) and not _joined(field.values)
        literal = isinstance(value, ast.Constant) and name == "value"  # None is a value there
        if literal or not (field is None or field == [] or empty_spec):
            fields.append(f"{name}={_dump(field)}")
    return f"{type(value).__name__}({','.join(fields)})"


def fingerprint(reference: str, site_packages: Sequence[str] | None = None) -> str | None:
    """Hash the installed definition of ``pkg.mod:Qual.name``; None if there is no such definition."""
    definitions = nodes(reference, site_packages)
    if all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in definitions):
        return None  # an import statement says nothing about the code: name the module that defines it
    return hashlib.sha256(_dump(definitions).encode()).hexdigest()[:16]


def split(reference: str) -> tuple[str, str]:
    """Split a ``pkg.mod:Qual.name`` reference into module and qualified name.

    Raises:
        FsePatchError: the text is not such a reference.
    """
    module, colon, qualname = reference.partition(":")
    if not colon or not all(p.isidentifier() for p in [*module.split("."), *qualname.split(".")]):
        raise FsePatchError(f"{reference!r}: write it as package.module:Name or package.module:Name.attr")
    return module, qualname


def source_file(module: str, site_packages: Sequence[str] | None = None) -> Path | None:
    """Find the file of ``module`` without importing its package; None if there is none.

    Args:
        module: dotted name.
        site_packages: folders to search in place of this process's ``sys.path``.
    """
    top, *rest = module.split(".")
    spec: ModuleSpec | None
    if site_packages is None:
        try:
            spec = importlib.util.find_spec(top)  # imports nothing: the name has no parent
        except ValueError:  # the module is loaded and has no __spec__
            return None
    else:
        spec = PathFinder.find_spec(top, site_packages)
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        # By its last name alone: a namespace package, such as sglang.srt, looks its parent up in sys.modules.
        spec = PathFinder.find_spec(part, list(spec.submodule_search_locations))
    if spec is None or not spec.has_location or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin)


@lru_cache(maxsize=64)
def _parse(path: Path, mtime_ns: int, size: int) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            return ast.parse(path.read_bytes(), filename=str(path))
    except (SyntaxError, ValueError) as error:
        raise FsePatchError(f"{path}: this Python cannot parse it: {error}") from error


def _statements(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """List the statements of a scope, with those under if, try and with, which open no scope."""
    for node in body:
        yield node
        if not isinstance(node, SCOPES):
            for field in ("body", "orelse", "handlers", "finalbody"):
                inner = getattr(node, field, None)
                if isinstance(inner, list):
                    yield from _statements(inner)


def _binds(node: ast.AST, name: str) -> bool:
    if isinstance(node, SCOPES):
        return node.name == name
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return any(isinstance(t, ast.Name) and t.id == name for t in targets)
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return any((a.asname or a.name.partition(".")[0]) == name for a in node.names)
    return False


def nodes_in(path: Path, qualname: str) -> list[ast.AST]:
    """List every statement of a file that binds ``qualname``; several where it is defined twice."""
    stat = path.stat()
    scope: list[ast.AST] = [_parse(path, stat.st_mtime_ns, stat.st_size)]
    for name in qualname.split("."):
        bodies = [getattr(node, "body", []) for node in scope]
        scope = [node for body in bodies for node in _statements(body) if _binds(node, name)]
    return scope


def nodes(reference: str, site_packages: Sequence[str] | None = None) -> list[ast.AST]:
    """List every statement that binds the referenced name in its installed module."""
    module, qualname = split(reference)
    path = source_file(module, site_packages)
    return [] if path is None else nodes_in(path, qualname)
