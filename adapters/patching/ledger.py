"""The ledger: what is patched, as YAML, with the fingerprints beside it as generated JSON.
A ledger file as written in YAML, and its validation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import Version
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from ... import patches as _data
from ...errors import FsePatchError
from ...fusion_core.checkpoint.families import Role
from ...settings import SWITCHES
from .source import split
from .spec import PatchSpec, Source

# MERGED adapters/ledger.py


FOLDER = Path(_data.__file__).parent


_FINGERPRINTS = TypeAdapter(dict[str, dict[str, str]])


@dataclass(frozen=True)
class Ledger:
    """Everything known about patching one engine. ``roles`` names the role of each entry class."""

    engine: str
    import_name: str
    distributions: tuple[str, ...]
    tested: tuple[str, ...]
    patches: tuple[PatchSpec, ...]
    roles: Mapping[str, Role]

    def is_tested(self, version: Version) -> bool:
        """Whether the release is on the tested list; local labels such as +cpu do not count."""
        return version.public in self.tested


def _problem(path: Path, error: ValidationError) -> FsePatchError:
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    return FsePatchError(f"{path}: {f'{field}: ' if field else ''}{first['msg']}")


def read_yaml(path: Path) -> EngineData:
    """Read and validate a ledger file.

    Raises:
        FsePatchError: it is missing or malformed; file and field are named.
    """
    try:
        raw: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        return EngineData.model_validate(raw)
    except FileNotFoundError:
        raise FsePatchError(f"{path}: no such ledger") from None
    except ValidationError as error:
        raise _problem(path, error) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise FsePatchError(f"{path}: {' '.join(str(error).split())}") from error


def read_fingerprints(path: Path) -> dict[str, dict[str, str]]:
    """Read the generated fingerprints: source to {version: hash}. A missing file holds none."""
    try:
        return _FINGERPRINTS.validate_python(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except ValidationError as error:
        raise _problem(path, error) from error
    except (OSError, ValueError) as error:
        raise FsePatchError(f"{path}: {error}") from error


def _expand(entry: Entry, data: EngineData) -> Iterator[Entry]:
    """The entry itself, or one for each entry class where its target stands for all of them."""
    if not entry.target.startswith(EVERY_ENTRY_CLASS):
        yield entry
        return
    attribute = entry.target.removeprefix(EVERY_ENTRY_CLASS)
    for owner in data.entry_classes:
        yield entry.model_copy(
            update={
                "id": f"{entry.id}.{owner.model.partition(':')[2]}",
                "target": f"{owner.model}.{attribute}",
                "source": owner.inherits.get(attribute),
                "holds": owner.decorated.get(attribute),
            }
        )


def _patch(entry: Entry, hashes: Mapping[str, dict[str, str]]) -> PatchSpec:
    def source(reference: str) -> Source:
        return Source(reference, hashes.get(reference, {}))

    return PatchSpec(
        id=entry.id,
        target=entry.target,
        versions=tuple(SpecifierSet(v) for v in entry.versions),
        source=source(entry.source or entry.target),
        holds=entry.holds or entry.source or entry.target,
        relies_on=tuple(source(r) for r in entry.relies_on),
        factory=entry.factory,
        why=entry.why,
        upstream=entry.upstream,
        remove_when=entry.remove_when,
        setting=entry.setting,
    )


def exists(engine: str) -> bool:
    """Whether there are patches for ``engine``."""
    return (FOLDER / f"{engine}.yaml").is_file()


def load(engine: str, folder: Path | None = None) -> Ledger:
    """The ledger of ``engine``, with fingerprints.

    Raises:
        FsePatchError: there is none, or a file is malformed.
    """
    folder = FOLDER if folder is None else folder
    path = folder / f"{engine}.yaml"
    if not path.is_file():
        raise FsePatchError(f"{engine}: this version of fse_patch has no patches for it")
    data = read_yaml(path)
    hashes = read_fingerprints(folder / f"{engine}.fingerprints.json")
    patches = tuple(_patch(e, hashes) for entry in data.patches for e in _expand(entry, data))
    roles: dict[str, Role] = {owner.model: owner.role for owner in data.entry_classes}
    return Ledger(
        data.engine, data.import_name, tuple(data.distributions), tuple(data.tested), patches, roles
    )


# MERGED adapters/ledger_file.py


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
