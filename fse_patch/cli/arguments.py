"""Arguments that several commands take. A wrong one is named before anything runs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import typer

from ..errors import FsePatchError, did_you_mean
from ..fusion_core.checkpoint.hub import cached_commit, is_repository, locate, snapshot_folder
from ..fusion_core.checkpoint.sources import Source
from ..patches import ENGINES

DTYPES = ("float32", "bfloat16", "float16")


def engine_of(name: str) -> str:
    """Return the engine that is meant; letters may be upper or lower case.

    Raises:
        FsePatchError: there is none of that name.
    """
    folded = name.strip().casefold()
    if folded not in ENGINES:
        raise FsePatchError(f"{name!r}: unknown engine; {did_you_mean(name, ENGINES)}")
    return folded


def engine_option(**more: Any) -> Any:
    """Return the option --engine."""
    return typer.Option(
        help=f"One of {', '.join(ENGINES)}.",
        callback=lambda name: name if name is None else engine_of(name),
        autocompletion=lambda: list(ENGINES),
        **more,
    )


def dtype_of(name: str) -> str:
    """Return the dtype that is meant.

    Raises:
        FsePatchError: it is none that both engines run.
    """
    if name not in DTYPES:
        other = {
            "fp16": "float16",
            "half": "float16",
            "bf16": "bfloat16",
            "fp32": "float32",
            "float": "float32",
        }
        meant = f"did you mean {other[name]}?" if name in other else did_you_mean(name, DTYPES)
        raise FsePatchError(f"--dtype {name!r}: unknown; {meant}")
    return name


def given(checkpoint: str) -> str:
    """Return a checkpoint as the user gave it, with ~ for the home folder written out.

    Raises:
        FsePatchError: it is a file, of a checkpoint or in another format.
    """
    path = Path(checkpoint).expanduser()
    if path.suffix.lower() == ".gguf" or (path.is_dir() and _holds_gguf_alone(path)):
        raise FsePatchError(
            f"{checkpoint}: GGUF is not supported; give a folder with config.json and safetensors files"
        )
    if path.is_file():
        raise FsePatchError(f"{checkpoint}: a file; give its folder: {path.parent}")
    return str(path) if checkpoint.startswith("~") else checkpoint


def _holds_gguf_alone(folder: Path) -> bool:
    return not (folder / "config.json").exists() and next(folder.glob("*.gguf"), None) is not None


def words_of(launch: list[str] | None) -> list[str]:
    """Return the words of a launch command; it may be given whole, in quotes.

    Raises:
        FsePatchError: its quotes are wrong.
    """
    if launch is None or len(launch) != 1:
        return launch or []
    try:
        return shlex.split(launch[0])
    except ValueError as error:
        raise FsePatchError(f"{launch[0]}: {error}") from None


def source_of(checkpoint: str, revision: str | None = None) -> Source:
    """Return where a checkpoint's files are: a folder, or a repository of a hub.

    Raises:
        FsePatchError: it is neither.
    """
    return locate(given(checkpoint), revision)


def folder_of(checkpoint: str) -> Path:
    """Return the folder of a checkpoint; that of a repository is in the local cache.

    Raises:
        FsePatchError: there is none, or the repository was not downloaded.
    """
    path = Path(given(checkpoint))
    if path.is_dir():
        return path
    if not is_repository(checkpoint):
        raise FsePatchError(f"{checkpoint}: no such folder; give the path of a downloaded checkpoint")
    commit = cached_commit(checkpoint, "main", None)
    folder = None if commit is None else snapshot_folder(checkpoint, commit, None)
    if folder is None:
        raise FsePatchError(
            f"{checkpoint}: no such folder, and not in the local cache; get it by `hf download {checkpoint}`"
        )
    return folder
