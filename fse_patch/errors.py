"""The errors that users see: one line each, with the exit status the command line gives them."""

from __future__ import annotations

from collections.abc import Iterable

# Exit statuses of the commands; docs/commands.md lists them. 70 is what sysexits.h calls a software error.
FAILED = 1
BAD_INPUT = 2
REFUSED = 3
ENGINE_DID_NOT_START = 4
NO_OUTPUT = 5
INTERNAL = 70


class FsePatchError(Exception):
    """Bad input or a patch that cannot be applied. The text says what, where and what to do."""

    exit_status = BAD_INPUT


class RefusedError(FsePatchError):
    """A request that fse_patch understands and declines, with a stable reason code."""

    exit_status = REFUSED

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class AuditError(FsePatchError):
    """A shared-expert slot was not written as decided: the model must not be served."""

    exit_status = FAILED


class EngineError(FsePatchError):
    """The engine did not start, or ended before it answered."""

    exit_status = ENGINE_DID_NOT_START


class NoReference(FsePatchError):
    """The checkpoint's tensors do not say what a layer computes; the text says why."""


def words(error: Exception) -> str:
    """Say an error in one line, with its type: one that is not ours."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the known word that is most like ``word``, as a question, or all of them."""
    from difflib import get_close_matches

    names = list(known)
    by_folded = {name.casefold(): name for name in names}
    alike = get_close_matches(word.casefold(), by_folded, 1, 0.75)
    if alike:
        return f"did you mean {by_folded[alike[0]]}?"
    return f"use {' or '.join(names)}" if len(names) < 3 else f"use one of {', '.join(names)}"
