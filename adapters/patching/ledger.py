"""Ledger: what is patched in an engine, as YAML, with the fingerprints beside it as generated JSON.

A patch that exists once for each MoE block is written once, with ``{block}`` in its id. A group of
definitions that patches rely on has a name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from packaging.specifiers import SpecifierSet
from packaging.version import Version
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from ...errors import FsePatchError
from ...fusion_core.checkpoint.families import Role, read_families
from ...fusion_core.data_file import Specifier, Strict, Text, check
from ...fusion_core.engines import EngineFacts, read_engine
from ...patches import FOLDER
from ...settings import SWITCHES
from .engine_families import (
    Block,
    EngineFamilies,
    EntryClass,
    Reference,
    ReliedOn,
    check_reference,
    engine_families,
)
from .source import split
from .spec import PatchSpec, Source, Unneeded

# Start of a target that stands for one attribute of every entry class.
EVERY_ENTRY_CLASS = "*."
# In the id of a patch that exists once for each block.
EVERY_BLOCK = "{block}"
_FINGERPRINTS = TypeAdapter(dict[str, dict[str, str]])


def _target(text: str) -> str:
    # One with a placeholder is checked when it is filled in.
    return text if text.startswith(EVERY_ENTRY_CLASS) or "{" in text else check_reference(text)


def _switch(text: str) -> str:
    if text not in SWITCHES:
        raise ValueError(f"{text!r} asks for no patch; use one of {', '.join(SWITCHES)}")
    return text


class Entry(Strict):
    """One patch as written; `PatchSpec` has the fields.

    ``relies_on`` has references, names of groups, and groups of the block as ``{block}.NAME``; each may hold
    for some releases only. Of a patch for every block, ``blocks_like`` leaves those that are built and called
    as this family's.
    """

    id: Text
    target: Annotated[str, AfterValidator(_target)]
    versions: Annotated[list[Specifier], Field(min_length=1)]
    blocks_like: Text | None = None
    source: Annotated[str, AfterValidator(_target)] | None = None
    holds: Text | None = None
    relies_on: list[ReliedOn] = Field(default_factory=list)
    factory: Reference
    why: Text
    upstream: Annotated[str, Field(pattern=r"^(https://\S+|none: \S.*|\{upstream\})$")]
    remove_when: Text
    unneeded: Unneeded | None = None
    setting: Annotated[str, AfterValidator(_switch)] | None = None


class Definition(ReliedOn):
    """A row of a group."""

    name: Reference


class _Patches(Strict):
    """The part of an engine's file that says what is patched."""

    groups: dict[Text, list[Definition]] = Field(default_factory=dict)
    patches: list[Entry]


@dataclass(frozen=True)
class Ledger:
    """Everything known about patching one engine.

    Args:
        roles, families: role and family of each entry class.
    """

    facts: EngineFacts
    patches: tuple[PatchSpec, ...]
    roles: Mapping[str, Role]
    families: Mapping[str, str]

    @property
    def engine(self) -> str:
        """Return the engine's name."""
        return self.facts.engine

    @property
    def tested(self) -> tuple[str, ...]:
        """List the releases in which fusing was run."""
        return self.facts.tested

    @property
    def listed(self) -> tuple[str, ...]:
        """List the releases whose seams were reviewed."""
        return self.facts.listed

    def patches_for(self, version: Version) -> tuple[PatchSpec, ...]:
        """Return the patches for a release, with what they rely on in it."""
        return tuple(patch.at(version) for patch in self.patches if patch.is_for(version))


def read_fingerprints(path: Path) -> dict[str, dict[str, str]]:
    """Read the generated fingerprints: source to {version: hash}. A missing file holds none."""
    try:
        return _FINGERPRINTS.validate_python(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except ValidationError as error:
        first = error.errors()[0]
        raise FsePatchError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (OSError, ValueError) as error:
        raise FsePatchError(f"{path}: {error}") from error


def exists(engine: str) -> bool:
    """Return whether there are patches for ``engine``."""
    return (FOLDER / f"{engine}.yaml").is_file()


def load(engine: str, folder: Path | None = None) -> Ledger:
    """Read the ledger of ``engine``, with fingerprints.

    Args:
        folder: of the data; that of this package if None.

    Raises:
        FsePatchError: there is none, or a file is malformed.
    """
    folder = FOLDER if folder is None else folder
    path = folder / f"{engine}.yaml"
    if not path.is_file():
        raise FsePatchError(f"{engine}: this version of fse_patch has no patches for it")
    facts, rest = read_engine(path)
    written = check(path, _Patches, rest)
    families = engine_families(engine, read_families(folder / "families"))
    hashes = read_fingerprints(folder / f"{engine}.fingerprints.json")
    try:
        patches = tuple(_expanded(written, families, hashes))
    except FsePatchError as error:
        raise FsePatchError(f"{path}: {error}") from error
    roles: dict[str, Role] = {owner.model: owner.role for owner in families.entry_classes}
    return Ledger(facts, patches, roles, families.families)


def _expanded(
    written: _Patches, families: EngineFamilies, hashes: Mapping[str, dict[str, str]]
) -> Iterator[PatchSpec]:
    """Make every patch, those for each entry class and for each block among them."""
    taken: set[str] = set()
    for entry in written.patches:
        made: list[tuple[Entry, frozenset[str]]]
        if entry.target.startswith(EVERY_ENTRY_CLASS):
            classes = [_for_class(entry, owner) for owner in families.entry_classes]
            made = [(patch, families.of_target(patch.target)) for patch in classes]
        elif EVERY_BLOCK in entry.id:
            blocks = (b for b in families.blocks if entry.blocks_like in (None, b.like))
            made = [(_for_block(entry, block), families.of_block(block)) for block in blocks]
        else:
            made = [(entry, families.of_target(entry.target))]
        for patch, owners in made:
            if patch.id in taken:
                raise FsePatchError(f"patch id {patch.id!r} occurs twice")
            taken.add(patch.id)
            yield _patch(patch, owners, written.groups, hashes)


def _for_class(entry: Entry, owner: EntryClass) -> Entry:
    attribute = entry.target.removeprefix(EVERY_ENTRY_CLASS)
    return entry.model_copy(
        update={
            "id": f"{entry.id}.{owner.model.partition(':')[2]}",
            "target": f"{owner.model}.{attribute}",
            "versions": _within(entry.versions, owner.versions),
            "source": owner.inherits.get(attribute),
            "holds": owner.decorated.get(attribute),
        }
    )


def _for_block(entry: Entry, block: Block) -> Entry:
    groups = {f"{EVERY_BLOCK}.{name}": rows for name, rows in block.relies_on.items()}
    return entry.model_copy(
        update={
            "id": block.fill(entry.id),
            "target": block.fill(entry.target),
            "versions": _within(entry.versions, block.versions),
            "relies_on": [row.of(block.fill(row.name), "") for row in _members(entry.relies_on, groups)],
            "why": block.fill(entry.why),
            "upstream": block.fill(entry.upstream),
        }
    )


def _within(versions: list[str], narrower: str) -> list[str]:
    return [f"{version},{narrower}" for version in versions] if narrower else versions


def _members(rows: Iterable[ReliedOn], groups: Mapping[str, Sequence[ReliedOn]]) -> Iterator[ReliedOn]:
    """Return the rows, with the members of a group in its place."""
    for row in rows:
        members = groups.get(row.name)
        yield from [row] if members is None else [row.of(member.name, member.versions) for member in members]


def _patch(
    entry: Entry,
    families: frozenset[str],
    groups: Mapping[str, list[Definition]],
    hashes: Mapping[str, dict[str, str]],
) -> PatchSpec:
    def source(reference: str, versions: str = "") -> Source:
        split(reference)
        return Source(reference, hashes.get(reference, {}), SpecifierSet(versions))

    for row in entry.relies_on:
        if ":" not in row.name and row.name not in groups:
            raise FsePatchError(
                f"patch {entry.id}: relies_on: {row.name!r} is neither a group nor a reference"
            )
    return PatchSpec(
        id=entry.id,
        target=entry.target,
        versions=tuple(SpecifierSet(v) for v in entry.versions),
        source=source(entry.source or entry.target),
        holds=entry.holds or entry.source or entry.target,
        relies_on=tuple(source(row.name, row.versions) for row in _members(entry.relies_on, groups)),
        factory=entry.factory,
        why=entry.why,
        upstream=entry.upstream,
        remove_when=entry.remove_when,
        unneeded=entry.unneeded,
        setting=entry.setting,
        families=families,
    )
