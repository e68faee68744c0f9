"""Data files in YAML, read and checked; an error is one line that names file and field."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ..errors import FsePatchError, did_you_mean

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
        place, message, _ = first_fault(error, kind)
        field = ".".join(map(str, place))
        raise FsePatchError(f"{path}: {f'{field}: ' if field else ''}{message}") from error


def first_fault(error: ValidationError, kind: type[BaseModel]) -> tuple[tuple[int | str, ...], str, str]:
    """Return the fault that says most: its place in the data, a message, and pydantic's type of it.

    Args:
        kind: what the data was checked against.
    """
    # A misspelt field is also a missing one: the misspelling says more.
    first = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    place, message = first["loc"], first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        known = _keys_at(kind, place[:-1])
        message = f"unknown key; {did_you_mean(str(place[-1]), known)}" if known else "unknown key"
    elif first["type"] == "model_type":
        message = f"should be an object with keys of {', '.join(_keys_at(kind, place))}"
    return place, message, first["type"]


def _keys_at(kind: type[BaseModel], place: Iterable[int | str]) -> list[str]:
    """Return the keys of the object at a place of the data, none where it is none of a fixed kind."""
    at: type[BaseModel] | None = kind
    for step in place:
        field = None if at is None else at.model_fields.get(str(step))
        # A number in a list, or a key of an object whose keys are free, stays with the field's own kind.
        if field is not None:
            at = _model_in(field.annotation)
    return [] if at is None else list(at.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)
