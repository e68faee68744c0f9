"""A ledger file as written in YAML, and its validation."""

from __future__ import annotations

from typing import Annotated, Literal

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from ..errors import FsePatchError
from ..settings import SWITCHES
from .source import split


def _reference(text: str) -> str:
    try:
        split(text)
    except FsePatchError as error:
        raise ValueError(str(error)) from error
    return text


def _specifier(text: str) -> str:
    try:
        SpecifierSet(text)
    except InvalidSpecifier as error:
        raise ValueError(str(error)) from error
    return text


def _target(text: str) -> str:
    return text if text.startswith(EVERY_ENTRY_CLASS) else _reference(text)


def _switch(text: str) -> str:
    if text not in SWITCHES:
        raise ValueError(f"{text!r} asks for no patch; use one of {', '.join(SWITCHES)}")
    return text


# Start of a target that stands for one attribute of every entry class.
EVERY_ENTRY_CLASS = "*."

Text = Annotated[str, Field(min_length=1)]
Reference = Annotated[str, AfterValidator(_reference)]
Target = Annotated[str, AfterValidator(_target)]
Switch = Annotated[str, AfterValidator(_switch)]
Versions = Annotated[list[Annotated[str, AfterValidator(_specifier)]], Field(min_length=1)]


class Entry(BaseModel):
    """One patch as written in the YAML; see `PatchSpec` for the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Text
    target: Target
    versions: Versions
    source: Reference | None = None
    holds: Text | None = None
    relies_on: list[Reference] = []
    factory: Reference
    why: Text
    upstream: Annotated[str, Field(pattern=r"^(https://\S+|none: \S.*)")]
    remove_when: Text
    setting: Switch | None = None


class EntryClass(BaseModel):
    """A model class that an engine instantiates by itself, for one role of a family we fuse.

    ``inherits`` names where a patched method is defined, if not in the class itself; ``decorated`` names
    the function that a class decorator has put in a method's place.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Reference
    role: Literal["main", "draft"]
    inherits: dict[str, Reference] = {}
    decorated: dict[str, Text] = {}


class EngineData(BaseModel):
    """A ledger file as written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    engine: Text
    import_name: Text
    distributions: Annotated[list[Text], Field(min_length=1)]
    tested: list[Text]
    entry_classes: list[EntryClass] = []
    patches: list[Entry]

    @model_validator(mode="after")
    def _unique(self) -> EngineData:
        ids = [p.id for p in self.patches]
        if twice := sorted({i for i in ids if ids.count(i) > 1}):
            raise ValueError(f"patch id {twice[0]!r} occurs twice")
        return self
