"""Data files in YAML, read and checked; an error is one line that names file and field."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ..errors import FsePatchError

# Ten times as fast as the one in Python.
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Kind = TypeVar("_Kind", bound=BaseModel)


class Strict(BaseModel):
    """A part of a data file: nothing but the fields that it has, and no value of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _specifier(text: str) -> str:
    try:
        SpecifierSet(text)
    except InvalidSpecifier as error:
        raise ValueError(str(error)) from error
    return text


def _release(text: str) -> str:
    try:
        Version(text)
    except InvalidVersion as error:
        raise ValueError(str(error)) from error
    return text


Text = Annotated[str, Field(min_length=1)]
# Of releases: ">=0.26,<0.27".
Specifier = Annotated[str, AfterValidator(_specifier)]
# One release: "0.26.0".
Release = Annotated[str, AfterValidator(_release)]


def parse(path: Path) -> Any:
    """Read a YAML file as plain data.

    Raises:
        FsePatchError: it cannot be read, or is no YAML.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=LOADER)
    except (OSError, UnicodeDecodeError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise FsePatchError(f"{path}: {' '.join(str(error).split())}") from error


def check(path: Path, kind: type[_Kind], data: Any) -> _Kind:
    """Check what was read of ``path``.

    Raises:
        FsePatchError: a field is missing, unknown or of another kind.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        place, message, _ = first_fault(error)
        field = ".".join(map(str, place))
        raise FsePatchError(f"{path}: {f'{field}: ' if field else ''}{message}") from error


def first_fault(error: ValidationError) -> tuple[tuple[int | str, ...], str, str]:
    """Return the fault that says most: its place in the data, a message, and pydantic's type of it."""
    # A misspelt field is also a missing one: the misspelling says more.
    first = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    return first["loc"], first["msg"].removeprefix("Value error, "), first["type"]
