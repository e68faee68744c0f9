"""Policy files; every error names file, line and field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ...errors import FsePatchError
from ...patches import FOLDER
from ..data_file import LOADER, first_fault
from .policy import Policy, PolicyFile, Rule

DEFAULT_POLICY = FOLDER / "policy.yaml"


def load_policy(user_file: Path | str | None = None) -> Policy:
    """Read the effective policy: the rules of ``user_file``, if given, before the default ones.

    Raises:
        FsePatchError: a file cannot be read, is no YAML, or breaks the schema.
    """
    rules = read_rules(DEFAULT_POLICY)
    if user_file is None:
        return Policy(rules)
    taken = dict.fromkeys((rule.id for rule in rules), "is taken by the default policy; rename it")
    return Policy(read_rules(Path(user_file), taken) + rules)


def read_rules(path: Path, taken: Mapping[str, str] | None = None) -> tuple[Rule, ...]:
    """Read the rules of one policy file, in order.

    Args:
        taken: ids that it may not use, and why.

    Raises:
        FsePatchError: the file cannot be read, is no YAML, or breaks the schema.
    """
    data, root = _parse(path)
    try:
        rules = PolicyFile.model_validate(data).rules
    except ValidationError as error:
        place, message, _ = first_fault(error, PolicyFile)
        raise _error(path, _line(root, place), _dotted(place), message) from None
    taken = dict(taken or {})
    for number, rule in enumerate(rules):
        line = _line(root, ["rules", number, "id"])
        if rule.id in taken:
            raise _error(path, line, f"rules[{number}].id", f"{rule.id!r} {taken[rule.id]}")
        taken[rule.id] = f"is the id at line {line} too"
    return tuple(rules)


def _parse(path: Path) -> tuple[Any, yaml.Node | None]:
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise FsePatchError(f"{path}: the policy cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise FsePatchError(f"{path}: the policy is not UTF-8 text (byte {error.start})") from None
    try:
        loader = LOADER(text)
        try:
            root = loader.get_single_node()
            _refuse_repeated_keys(path, root, "", set())
            return (None if root is None else loader.construct_document(root)), root
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _error(path, mark.line + 1 if mark else 1, "", f"not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _error(path, 1, "", f"not valid YAML: {' '.join(str(error).split())}") from None


def _refuse_repeated_keys(path: Path, node: yaml.Node | None, place: str, seen: set[int]) -> None:
    # YAML keeps the last of two equal keys without a word; a policy must not lose a line so.
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            if name in keys:
                raise _error(path, key.start_mark.line + 1, f"{place}{name}", "given twice")
            keys.add(name)
            _refuse_repeated_keys(path, value, f"{place}{name}.", seen)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            _refuse_repeated_keys(path, value, f"{place.removesuffix('.')}[{number}].", seen)


def _line(node: yaml.Node | None, place: Sequence[int | str]) -> int:
    """Return the line of the deepest node on the way to ``place``: of what is missing, that of its object."""
    line = 1 if node is None else node.start_mark.line + 1
    for step in place:
        if isinstance(node, yaml.MappingNode):
            field = next(((key, value) for key, value in node.value if key.value == step), None)
            if field is None:
                break
            line, node = field[0].start_mark.line + 1, field[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line + 1
        else:
            break
    return line


def _dotted(place: Iterable[int | str]) -> str:
    return "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in place).removeprefix(".")


def _error(path: Path, line: int, field: str, message: str) -> FsePatchError:
    where = f"field '{field}': " if field else ""
    return FsePatchError(f"{path}: line {line}: {where}{message}")
