"""Where an installed definition stands, found and parsed without importing the engine."""

from __future__ import annotations

import ast
import importlib.util
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from ..errors import FsePatchError

SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def split(reference: str) -> tuple[str, str]:
    """Module and qualified name of a ``pkg.mod:Qual.name`` reference.

    Raises:
        FsePatchError: the text is not such a reference.
    """
    module, colon, qualname = reference.partition(":")
    if not colon or not all(p.isidentifier() for p in [*module.split("."), *qualname.split(".")]):
        raise FsePatchError(f"{reference!r}: write it as package.module:Name or package.module:Name.attr")
    return module, qualname


def source_file(module: str, site_packages: Sequence[str] | None = None) -> Path | None:
    """The file of ``module``, found without importing its package, or None.

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
    """Statements of a scope, with those under if, try and with, which open no scope."""
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
    """Every statement of a file that binds ``qualname``; several where it is defined twice."""
    stat = path.stat()
    scope: list[ast.AST] = [_parse(path, stat.st_mtime_ns, stat.st_size)]
    for name in qualname.split("."):
        bodies = [getattr(node, "body", []) for node in scope]
        scope = [node for body in bodies for node in _statements(body) if _binds(node, name)]
    return scope


def nodes(reference: str, site_packages: Sequence[str] | None = None) -> list[ast.AST]:
    """Every statement that binds the referenced name in its installed module."""
    module, qualname = split(reference)
    path = source_file(module, site_packages)
    return [] if path is None else nodes_in(path, qualname)
