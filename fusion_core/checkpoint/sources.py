"""Places where the files of a checkpoint are: a folder here, and what every other place must answer too."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import FsePatchError
from .headers import FileHeader, read_file_header

CONFIG_NAME = "config.json"


def read_json(path: Path, where: str = "") -> dict[str, Any]:
    """Read the JSON object in ``path``.

    Args:
        where: how messages call it; its path if empty.

    Raises:
        FsePatchError: the file cannot be read, or holds no JSON object.
    """
    where = where or str(path)
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise FsePatchError(f"{where}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise FsePatchError(f"{where}: not valid JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise FsePatchError(f"{where}: holds a JSON {type(value).__name__}, not an object")
    return value


class Source(ABC):
    """A checkpoint's files, by name; processes send it to each other."""

    # Whether an engine downloads from it what it loads.
    is_remote = False

    @property
    @abstractmethod
    def label(self) -> str:
        """Return what users call the checkpoint."""

    @abstractmethod
    def names(self) -> frozenset[str]:
        """List the files at the top of the checkpoint, hidden ones too."""

    @abstractmethod
    def local(self, name: str) -> Path | None:
        """Return where a file lies on this machine, or None."""

    @abstractmethod
    def fetch(self, name: str) -> Path:
        """Return where a small file lies, and get it here first if need be.

        Raises:
            FsePatchError: it cannot be had.
        """

    @abstractmethod
    def headers(self, names: Iterable[str]) -> Mapping[str, FileHeader]:
        """Read the headers of safetensors files, by file.

        Raises:
            FsePatchError: one is missing, truncated or malformed.
        """

    @abstractmethod
    def loaded(self) -> Source:
        """Return the files that an engine has loaded from here by now."""

    def missing(self, name: str, because: str) -> FsePatchError:
        """Return the error for a file that is needed and not there."""
        return FsePatchError(f"{self.label}/{name}: missing, but {because}; download the whole checkpoint")

    def __contains__(self, name: str) -> bool:
        return name in self.names()

    def where(self, name: str) -> str:
        """Return how messages call a file."""
        return f"{self.label}/{name}"

    def read_json(self, name: str) -> dict[str, Any]:
        """Read the JSON object in a file.

        Raises:
            FsePatchError: the file cannot be read, or holds no JSON object.
        """
        return read_json(self.fetch(name), self.where(name))


@dataclass(frozen=True)
class FolderSource(Source):
    """A folder of this machine."""

    folder: Path

    @property
    def label(self) -> str:
        """Return the folder's path."""
        return str(self.folder)

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(path.name for path in self.folder.iterdir())

    def names(self) -> frozenset[str]:
        """List the folder; links that lead nowhere are in it, as engines see them too.

        Raises:
            FsePatchError: there is no such folder.
        """
        if not self.folder.is_dir():
            raise FsePatchError(f"{self.folder}: no such folder; give the path of a downloaded checkpoint")
        return self._names

    def __contains__(self, name: str) -> bool:
        return name in self.names() and self.local(name) is not None

    def local(self, name: str) -> Path | None:
        """Return the file's path, where it leads to a file."""
        path = self.folder / name
        return path if path.is_file() else None

    def fetch(self, name: str) -> Path:
        """Return the file's path: there is nowhere to get it from."""
        return self.folder / name

    def headers(self, names: Iterable[str]) -> Mapping[str, FileHeader]:
        """Read the headers of files in the folder."""
        return {name: read_file_header(self.folder / name) for name in names}

    def loaded(self) -> Source:
        """Return the folder as it is now."""
        return FolderSource(self.folder)

    def __getstate__(self) -> dict[str, Any]:
        # The listing is this process's.
        return {"folder": self.folder}


def folder_source(checkpoint: Source | Path | str) -> Source:
    """Return a source as it is, and a path as the folder there."""
    return checkpoint if isinstance(checkpoint, Source) else FolderSource(Path(checkpoint))
