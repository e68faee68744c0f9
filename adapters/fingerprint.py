"""A short hash of an installed definition: its syntax tree without docstrings and comments.

The dump is our own: ``ast.dump`` differs between Python releases, and a fingerprint has to hold on all.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Sequence

from .source import SCOPES, nodes

# Load, Store and Del follow from the place in the tree; the others are comments or typing-only.
_SKIPPED_FIELDS = {"ctx", "kind", "type_comment", "type_ignores"}


def _is_docstring(node: ast.AST) -> bool:
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _joined(values: Sequence[ast.AST]) -> list[ast.AST]:
    """Parts of an f-string, adjacent literals merged: how they are cut up differs between Python releases."""
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
    """Hash of the installed definition of ``pkg.mod:Qual.name``, or None if there is no such definition."""
    found = nodes(reference, site_packages)
    if all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in found):
        return None  # an import statement says nothing about the code: name the module that defines it
    return hashlib.sha256(_dump(found).encode()).hexdigest()[:16]
