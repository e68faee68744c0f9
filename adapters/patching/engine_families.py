"""Model families in an engine: the classes that it instantiates, and their MoE blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from ...errors import FsePatchError
from ...fusion_core.checkpoint.families import FamilyFile, Role, family_files
from ...fusion_core.data_file import Specifier, Strict, Text, check
from .source import split


def check_reference(text: str) -> str:
    """Check a ``pkg.mod:Qual.name`` reference and return it, as pydantic wants it.

    Raises:
        ValueError: it is none.
    """
    try:
        split(text)
    except FsePatchError as error:
        raise ValueError(str(error)) from error
    return text


Reference = Annotated[str, AfterValidator(check_reference)]
Upstream = Annotated[str, Field(pattern=r"^(https://\S+|none: \S.*)")]


class ReliedOn(Strict):
    """A definition, or a group of them, whose behaviour a patch assumes; a plain text for every release."""

    name: Text
    versions: Specifier = ""

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, data: Any) -> Any:
        return {"name": data} if isinstance(data, str) else data

    def of(self, name: str, versions: str) -> ReliedOn:
        """Give a member of this group: it holds where both do."""
        return ReliedOn(name=name, versions=",".join(filter(None, (self.versions, versions))))


class EntryClass(Strict):
    """A model class that an engine instantiates by itself, for one role of a family.

    ``inherits`` names where a patched method is defined, if not in the class itself; ``decorated`` names
    the function that a class decorator has put in a method's place.
    """

    model: Reference
    role: Role
    versions: Specifier = ""
    inherits: dict[Text, Reference] = Field(default_factory=dict)
    decorated: dict[Text, Text] = Field(default_factory=dict)


class BlockEntry(Strict):
    """A block as written: a class for this family, or another family's by reference."""

    same_as: Text | None = None
    class_: Annotated[Reference | None, Field(alias="class")] = None
    like: Text | None = None
    versions: Specifier = ""
    relies_on: dict[Text, list[ReliedOn]] = Field(default_factory=dict)
    upstream: Upstream | None = None
    note: str = ""
    arguments: dict[Text, Any] = Field(default_factory=dict)
    from_config: dict[Text, Text] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_class(self) -> BlockEntry:
        if (self.same_as is None) == (self.class_ is None):
            raise ValueError("give one of class and same_as")
        if self.class_ is not None and self.upstream is None:
            raise ValueError("a block with a class needs upstream")
        if self.same_as is not None and (extra := self.model_fields_set - {"same_as", "arguments"}):
            raise ValueError(f"{min(extra)}: the block of {self.same_as} has it")
        return self


class _EngineFamily(Strict):
    entry_classes: Annotated[list[EntryClass], Field(min_length=1)]
    block: BlockEntry


class _Engines(Strict):
    engines: dict[str, _EngineFamily]


@dataclass(frozen=True)
class Block:
    """The MoE block of a family in one engine.

    Args:
        family: whose file has it.
        reference: its class, as ``pkg.mod:Name``.
        like: the family whose block it is built and called as; its own where it says nothing.
        versions: releases that have it; "": every one.
        relies_on: named groups of definitions, placeholders not filled in.
        upstream, note: for the patches of this block.
        arguments: of its constructor, besides what every block gets.
        from_config: others of them, as paths below the engine's configuration; "." is that itself.
    """

    family: str
    reference: str
    like: str
    versions: str
    relies_on: Mapping[str, list[ReliedOn]]
    upstream: str
    note: str
    arguments: Mapping[str, Any]
    from_config: Mapping[str, str]

    def fill(self, text: str) -> str:
        """Put this block into the placeholders of ``text``.

        Raises:
            FsePatchError: a placeholder is unknown.
        """
        known = {
            "block": self.family.replace("_", "-"),
            "class": self.reference,
            "module": split(self.reference)[0],
            "upstream": self.upstream,
            "note": self.note,
        }
        try:
            return text.format_map(known).rstrip()
        except (KeyError, ValueError, IndexError) as error:
            raise FsePatchError(f"{text!r}: use placeholders of {', '.join(known)}") from error


@dataclass(frozen=True)
class EngineFamilies:
    """All families in one engine.

    Args:
        entry_classes: in the order of their files.
        families: entry class -> its family.
        blocks: those that stand with their class in a file.
        used: family -> the block that its models build, with their arguments.
    """

    entry_classes: tuple[EntryClass, ...]
    families: Mapping[str, str]
    blocks: tuple[Block, ...]
    used: Mapping[str, Block]

    def of_target(self, target: str) -> frozenset[str]:
        """Return the families that an attribute of an entry class or of a block is for; none: all of them."""
        owner = target.rpartition(".")[0]
        if owner in self.families:
            return frozenset({self.families[owner]})
        return frozenset(f for f, block in self.used.items() if block.reference == owner)

    def of_block(self, block: Block) -> frozenset[str]:
        """Return the families whose models build a block."""
        return frozenset(f for f, used in self.used.items() if used.family == block.family)


def engine_families(engine: str, files: Iterable[FamilyFile]) -> EngineFamilies:
    """Read what the family files say of ``engine``.

    Raises:
        FsePatchError: a file is malformed, or refers to a block that no file has.
    """
    entries: list[EntryClass] = []
    owners: dict[str, str] = {}
    written: dict[str, tuple[FamilyFile, BlockEntry]] = {}
    for file in files:
        if engine in file.engines:
            here = check(file.path, _Engines, {"engines": {engine: file.engines[engine]}}).engines[engine]
            entries += here.entry_classes
            owners |= {entry.model: file.spec.name for entry in here.entry_classes}
            written[file.spec.name] = file, here.block
    blocks = {name: _block(name, block, block) for name, (_, block) in written.items() if block.class_}
    used = dict(blocks)
    for name, (file, block) in written.items():
        for field, other in (("same_as", block.same_as), ("like", block.like)):
            if other is not None and other not in blocks:
                place = f"engines.{engine}.block.{field}"
                raise FsePatchError(f"{file.path}: {place}: {other!r} has no block of its own here")
        if block.same_as is not None:
            used[name] = _block(block.same_as, written[block.same_as][1], block)
    return EngineFamilies(tuple(entries), owners, tuple(blocks.values()), used)


def _block(family: str, entry: BlockEntry, borrower: BlockEntry) -> Block:
    """Make the block that ``entry`` describes, with the arguments of ``borrower`` where it gives any."""
    assert entry.class_ is not None
    assert entry.upstream is not None
    arguments = borrower.arguments if "arguments" in borrower.model_fields_set else entry.arguments
    return Block(
        family,
        entry.class_,
        entry.like or family,
        entry.versions,
        entry.relies_on,
        entry.upstream,
        entry.note,
        arguments,
        entry.from_config,
    )


@cache
def _shipped(engine: str) -> EngineFamilies:
    return engine_families(engine, family_files())


def block_of(engine: str, family: str) -> Block:
    """Return the block that models of ``family`` build in ``engine``, for measuring it.

    Raises:
        FsePatchError: the family has none there.
    """
    block = _shipped(engine).used.get(family)
    if block is None:
        raise FsePatchError(f"{family}: has no block in {engine}; see patches/families/")
    return block
