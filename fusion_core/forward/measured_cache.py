"""Cache of what was measured on this machine: one file a situation, for thresholds of paired layers.

A file is replaced in one step, under a lock; where the disk cannot be written, nothing is kept, and the next
start measures again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import Field, ValidationError

from ...errors import FsePatchError
from ..data_file import Strict, Text

log = logging.getLogger("fse_patch")
FOLDER = "tuned"
_LOCK_SECONDS = 5.0


@dataclass(frozen=True)
class PairedSituation:
    """Everything that a measured threshold depends on; another value of any of these is another measurement.

    Args:
        device, driver: the GPU's name, and the version of its driver.
        backend: who runs the engine's grouped GEMM, in its own word.
        dtype: of hidden states.
        routed, shared: formats of the weights; "" for a shared expert among the routed ones.
        width, shared_width: I and I_s, as they lie in this process.
        version: of fse_patch.
    """

    device: str
    driver: str
    engine: str
    release: str
    backend: str
    dtype: str
    routed: str
    shared: str
    num_experts: int
    top_k: int
    hidden_size: int
    width: int
    shared_width: int
    scoring: str
    gated: bool
    version: str

    @property
    def name(self) -> str:
        """Return the name of its file, without the ending: 16 hex digits."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        formats = " + ".join(filter(None, (self.routed, self.shared)))
        return (
            f"{self.engine} {self.release} ({self.backend}) on {self.device}: {self.dtype}, {formats}, "
            f"E={self.num_experts}, k={self.top_k}, H={self.hidden_size}, I={self.width}+{self.shared_width}"
        )


class Kept(Strict):
    """A file of the cache; ``bounds`` are lower bounds of stock over ours by "tokens routing"."""

    situation: dict[str, Any]
    threshold: int = Field(ge=0)
    bounds: dict[Text, float]

    @property
    def words(self) -> str:
        """Say what was measured."""
        try:
            return str(PairedSituation(**self.situation))
        except TypeError:  # of another version, with other fields
            return json.dumps(self.situation, sort_keys=True)


def load(folder: Path, situation: PairedSituation) -> Kept | None:
    """Return what is kept for a situation; None where there is nothing that can be read."""
    kept = _read(folder / FOLDER / f"{situation.name}.json")
    return kept if kept is not None and kept.situation == asdict(situation) else None


def keep(folder: Path, situation: PairedSituation, threshold: int, bounds: dict[str, float]) -> bool:
    """Keep a threshold; return whether that was possible."""
    place = folder / FOLDER
    text = Kept(situation=asdict(situation), threshold=threshold, bounds=bounds).model_dump_json(indent=2)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / ".lock", timeout=_LOCK_SECONDS):
            handle, part = tempfile.mkstemp(dir=place, suffix=".part")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(text + "\n")
                os.replace(part, place / f"{situation.name}.json")
            except BaseException:
                Path(part).unlink(missing_ok=True)
                raise
    except (OSError, Timeout, NotImplementedError) as error:
        log.info("the measured threshold is not kept: %s", error)
        return False
    return True


def kept(folder: Path) -> dict[str, Kept]:
    """Return every file of the cache that can be read, by name."""
    found = {path.stem: _read(path) for path in sorted((folder / FOLDER).glob("*.json"))}
    return {name: entry for name, entry in found.items() if entry is not None}


def remove(folder: Path, name: str) -> None:
    """Remove one entry.

    Raises:
        FsePatchError: there is none of that name, or it cannot be removed.
    """
    place = folder / FOLDER
    if name not in {path.stem for path in place.glob("*.json")}:
        raise FsePatchError(f"{name}: nothing of that name is kept in {place}; see `fse-patch tuned list`")
    try:
        with FileLock(place / ".lock", timeout=_LOCK_SECONDS):
            (place / f"{name}.json").unlink(missing_ok=True)
    except (OSError, Timeout, NotImplementedError) as error:
        raise FsePatchError(f"{place / name}.json: cannot be removed: {error}") from None


def _read(path: Path) -> Kept | None:
    try:
        return Kept.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError):
        return None
