"""The ledger: what is patched, as YAML, with the fingerprints beside it as generated JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from pydantic import TypeAdapter, ValidationError

from .. import patches as _data
from ..errors import FsePatchError
from ..fusion_core.families import Role
from .ledger_file import EVERY_ENTRY_CLASS, EngineData, Entry
from .spec import PatchSpec, Source

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
