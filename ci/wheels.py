"""Releases of engines as the package index has them: their Python files and the names of their tuned tables.

They lie in .cache/releases, a folder for each release, as installed; nothing of them is run.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "releases"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]


class FetchError(Exception):
    """What pip could not do, with its last line."""


def newest(distribution: str) -> str:
    """Return the newest release on the index, none of a preview.

    Raises:
        FetchError: the index does not know the distribution.
    """
    listed = _pip("index", "versions", distribution)
    first = next((line for line in listed.splitlines() if line.startswith(f"{distribution} (")), "")
    if not first:
        raise FetchError(f"{distribution}: pip names no release of it")
    return str(Version(first.partition("(")[2].partition(")")[0]))


def fetch(distribution: str, release: str) -> Path:
    """Return the folder of a release; its wheel is fetched where it is not there yet, and thrown away then.

    Raises:
        FetchError: there is no wheel of it.
    """
    folder = CACHE / f"{distribution}-{release}"
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as place:
        _pip(
            "download", "--no-deps", "--no-cache-dir", "--only-binary=:all:", "--dest", place,
            f"{distribution}=={release}",
        )  # fmt: skip
        (wheel,) = Path(place).glob("*.whl")
        unpacked = Path(place) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            for name in filter(is_read, archive.namelist()):
                target = unpacked / name
                target.parent.mkdir(parents=True, exist_ok=True)
                # Of tables the name says all that is asked.
                target.write_bytes(b"" if name.endswith(".json") else archive.read(name))
        # In one step: what was cut off is fetched again.
        shutil.move(unpacked, folder)
    return folder


def is_read(name: str) -> bool:
    """Return whether a file of a wheel is kept: Python, the version, and the tuned tables by their names."""
    path = Path(name)
    table = path.name.startswith("E=") and path.suffix == ".json"
    return path.suffix == ".py" or table or name.endswith(".dist-info/METADATA")


def _pip(*arguments: str) -> str:
    done = subprocess.run([*PIP, *arguments], capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise FetchError("; ".join(said[-2:]) or f"pip ended with status {done.returncode}")
    return done.stdout
