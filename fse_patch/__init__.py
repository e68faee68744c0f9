"""Fuse the shared expert into the routed experts' kernel, in released vLLM and SGLang, from outside."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .version import __version__

_FOLDER = Path(__file__).parent
# In a clone the core, the adapters and the data stand beside this folder: package-dir in pyproject.toml.
if not (_FOLDER / "fusion_core").exists() and (_FOLDER.parent / "fusion_core" / "__init__.py").is_file():
    __path__.append(str(_FOLDER.parent))

if TYPE_CHECKING:
    from .report import Report

__all__ = ["__version__", "apply", "remove", "status"]

# The functions import what they need when called: importing fse_patch must cost nothing.


def apply(engine: str, *, strict: bool | None = None) -> Report:
    """Patch an installed engine in this process and in its child processes, before or after it is imported.

    A release that is not listed is patched where all that the patches need of it reads as in one that is.

    Args:
        engine: "vllm" or "sglang".
        strict: raise when a patch cannot be applied; otherwise the report says what was refused, and the
            engine is untouched, or its models of those families that the patch is for. Default:
            FSE_PATCH_STRICT, and to raise where it is not set.

    Returns:
        What was patched, what waits for its module to be imported, and what was refused and why.

    Raises:
        RefusedError: the engine is not one that the patches were written for.
        FsePatchError: unknown engine, engine not installed, or a patch that failed; nothing is changed.
    """
    from . import session

    return session.apply(engine, strict=strict)


def remove(engine: str) -> None:
    """Put every original of ``engine`` back, by identity, and restore FSE_PATCH as it was.

    Models that are already built keep running as they were built.

    Raises:
        FsePatchError: unknown engine, or a name that could not be put back.
    """
    from . import session

    session.remove(engine)


def status() -> dict[str, Any]:
    """Return what is patched, decided, loaded and counted in this process, by engine, ready for JSON.

    ``roles`` has what was built here, main model and draft: its fused layers, ``slots_loaded``, ``compared``
    (values that were found in the slots as the checkpoint has them) and ``canary``, whose ``state`` is
    "passed", "pending", "off", "not_loaded" or "no_reference".
    """
    from . import session

    return session.status()
