"""Finds in a syntax tree what code takes of an engine: imported names, attributes, private names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fse_patch.adapters.patching.source import split
from fse_patch.patches import ENGINES

PRIVATE = re.compile(r"_[A-Za-z]\w*")
# Begins names that this project puts on objects of an engine.
OURS = "_fse_patch"
IMPORTS = {"import_module", "__import__"}
BY_NAME = {"getattr", "hasattr", "setattr", "delattr"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


@dataclass(frozen=True)
class EngineName:
    """One name of an engine, and where it is used.

    Args:
        path: dotted, with the engine's package: "vllm.envs.VLLM_X". A private name of an object that the tree
            does not tell: "._name". What only a run tells stands in braces: "vllm.envs.{name}".
    """

    path: str
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.path}"


def engine_names(source: str, file: str) -> list[EngineName]:
    """Every name of an engine that ``source`` uses, in order."""
    finder = _Finder(ast.parse(source))
    return [EngineName(path, file, line) for path, line in finder.names()]


def is_covered(path: str, references: Iterable[str]) -> bool:
    """Whether a reference is the name itself, something that it is a part of, or its constructor."""
    known = (".".join(split(reference)) for reference in references)
    return any(
        path in (name, name.removesuffix(".__init__")) or path.startswith(f"{name}.") for name in known
    )


class _Finder(ast.NodeVisitor):
    def __init__(self, tree: ast.Module) -> None:
        self._tree = tree
        self._found: dict[str, int] = {}
        # Text constants of the module, by name.
        self._constants = {
            target.id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name) and isinstance(node.value.value, str)
        }
        # What names are bound to, outermost scope first; None: something else than a part of an engine.
        self._scopes: list[dict[str, str | None]] = []
        # Import statements: what they bind, and where.
        self._imports: dict[str, int] = {}
        # Attributes that the class around defines on its own.
        self._own: list[set[str]] = [set()]

    def names(self) -> Iterator[tuple[str, int]]:
        """Paths and the lines of their first use."""
        self._enter([], self._tree.body)
        for path, line in self._imports.items():
            # A module is asked for its parts; what is never used is asked for itself.
            if not any(name == path or name.startswith(f"{path}.") for name in self._found):
                self._note(path, line)
        yield from sorted(self._found.items(), key=lambda item: item[1])

    def _note(self, path: str, line: int) -> None:
        self._found.setdefault(path, line)

    # What an expression stands for.

    def _resolve(self, node: ast.AST) -> str | None:
        if isinstance(node, ast.Name):
            return next((s[node.id] for s in reversed(self._scopes) if node.id in s), None)
        if isinstance(node, ast.Attribute):
            return self._part(node.value, node.attr)
        if isinstance(node, ast.Call) and _called(node) in IMPORTS and node.args:
            module = self._text(node.args[0])
            return module if _is_of_engine(module) or module.startswith("{") else None
        if isinstance(node, ast.Call) and _called(node) in BY_NAME and len(node.args) > 1:
            return self._part(node.args[0], self._text(node.args[1]))
        if isinstance(node, ast.Subscript) and _called(node.value) == "vars":
            return self._part(*node.value.args, self._text(node.slice))
        return None

    def _part(self, owner: ast.AST, name: str) -> str | None:
        path = self._resolve(owner)
        return None if path is None else f"{path}.{name}"

    def _text(self, node: ast.AST) -> str:
        """A text as far as the tree tells it."""
        if isinstance(node, ast.JoinedStr):
            return "".join(map(self._text, node.values))
        if isinstance(node, ast.FormattedValue):
            return self._text(node.value)
        if isinstance(node, ast.Constant):
            return str(node.value)
        return self._constants.get(_identifier(node), f"{{{ast.unparse(node)}}}")

    # Scopes.

    def _enter(self, parameters: Iterable[str], body: list[ast.stmt]) -> None:
        self._scopes.append(dict.fromkeys(parameters))
        for node in _statements(body):
            self._bind(node)
        for statement in body:
            self.visit(statement)
        self._scopes.pop()

    def _bind(self, node: ast.AST) -> None:
        scope = self._scopes[-1]
        if isinstance(node, ast.Import):
            for alias in node.names:
                if _is_of_engine(alias.name):
                    scope[alias.asname or alias.name.partition(".")[0]] = (
                        alias.name if alias.asname else alias.name.partition(".")[0]
                    )
                    self._imports.setdefault(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom) and not node.level and _is_of_engine(node.module or ""):
            for alias in node.names:
                scope[alias.asname or alias.name] = path = f"{node.module}.{alias.name}"
                self._imports.setdefault(path, node.lineno)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name):
                    scope[target.id] = self._resolve(node.value)

    def _visit_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        arguments = node.args
        listed = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        listed += [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
        self.visit(arguments)
        if isinstance(node, ast.Lambda):
            self._enter([a.arg for a in listed], [ast.Expr(node.body)])
            return
        for part in (*node.decorator_list, *filter(None, [node.returns])):
            self.visit(part)
        self._enter([a.arg for a in listed], node.body)

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _visit_function

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for base in filter(None, map(self._resolve, node.bases)):
            for member in node.body:
                if isinstance(member, FUNCTIONS):
                    self._note(f"{base}.{member.name}", member.lineno)
        self._own.append(_defined(node))
        self.generic_visit(node)
        self._own.pop()

    # Uses.

    def _visit_use(self, node: ast.Name | ast.Attribute | ast.Call | ast.Subscript) -> None:
        path = self._resolve(node)
        if path is None:
            if isinstance(node, ast.Attribute):
                self._note_private(node.attr, node.lineno, of_self=_identifier(node.value) in ("self", "cls"))
            self.generic_visit(node)
            return
        self._note(path, node.lineno)
        if isinstance(node, ast.Call):
            for value in node.args[2:]:
                self.visit(value)

    visit_Name = visit_Attribute = visit_Call = visit_Subscript = _visit_use

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        for value in node.values:
            if isinstance(value, ast.FormattedValue):
                self.visit(value.value)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self._note_private(node.value, node.lineno)

    def _note_private(self, name: str, line: int, of_self: bool = False) -> None:
        ours = name.startswith(OURS) or (of_self and name in self._own[-1])
        if PRIVATE.fullmatch(name) and not ours:
            self._note(f".{name}", line)


def _identifier(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _called(node: ast.AST) -> str:
    """The name of the function that an expression calls, or nothing."""
    if not isinstance(node, ast.Call):
        return ""
    return node.func.attr if isinstance(node.func, ast.Attribute) else _identifier(node.func)


def _is_of_engine(module: str) -> bool:
    return module.partition(".")[0] in ENGINES


def _statements(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Statements of a scope in order, without those of the functions and classes in it."""
    for node in body:
        yield node
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            yield from _statements(n for n in ast.iter_child_nodes(node) if not isinstance(n, ast.expr))


def _defined(node: ast.ClassDef) -> set[str]:
    """Names that a class defines in its body, and those that its methods set on ``self``."""
    names = {n.name for n in node.body if isinstance(n, FUNCTIONS)}
    stored = [n for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
    names |= {n.attr for n in stored if _identifier(n.value) == "self"}
    return names | {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and _identifier(n.target)}
