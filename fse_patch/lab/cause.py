"""The first cause of a failed engine, out of all that its processes wrote: they end with what follows."""

from __future__ import annotations

import re
from collections.abc import Iterator

TRACEBACK = "Traceback (most recent call last):"
# What engines put before each line: process, level and place, rank.
_PREFIX = re.compile(
    r"(?:\([^()]*\bpid=\d+\)\s?|(?:ERROR|CRITICAL|WARNING|INFO) [\d-]+ [\d:.]+ \[[^\]]*\]\s?"
    r"|\[\d{4}-[^\]]*\]\s?|\[rank\d+\]:\s?)*"
)
_HARMLESS = re.compile(r"\b(?:WARNING|INFO)\b")
# The last line of a traceback; a name in lower case would be a word of a sentence.
_RAISED = re.compile(r"(?:\w+\.)*(?P<name>[A-Z]\w*)(?:: (?P<text>.*))?$")
# In a traceback, or as `stop_told` says it.
_OURS = re.compile(r"(?:\bfse_patch\.(?:\w+\.)*|\bstopped: )(?P<name>[A-Z]\w*): (?P<text>.+)")
# Errors of a process that another one has ended.
_FOLLOW_UP = re.compile(
    r"root cause|(?:stack trace|messages?|logs?) \(?above|EngineDead|EngineCore.*(?:dead|died)"
    r"|died (?:during|unexpect)|ended with status"
    r"|^(?:EOFError|BrokenPipeError|ConnectionResetError|ChildProcessError|SystemExit|KeyboardInterrupt)\b"
)


def first_cause(log: str) -> str:
    """Return the first error of ours in ``log``, else the first of a traceback that follows from no other.

    "" where there is none.
    """
    for line in log.splitlines():
        if (match := _OURS.search(line)) is not None:
            return _named(match)
    return next((error for error in _raised(log) if not is_follow_up(error)), "")


def is_follow_up(error: str) -> bool:
    """Return whether an error only says that there was another one."""
    return _FOLLOW_UP.search(error) is not None


def with_cause(error: str, log: str) -> str:
    """Return ``error``, or what it follows from where ``log`` has that."""
    if not is_follow_up(error):
        return error
    cause = first_cause(log)
    # How a process ended is news beside why.
    return f"{error}: {cause}" if cause and "ended with status" in error else cause or error


def _raised(log: str) -> Iterator[str]:
    """Yield the last line of each traceback, in their order; processes may write at the same time."""
    within: set[str] = set()
    for line in log.splitlines():
        prefix = _PREFIX.match(line)
        at = prefix.end() if prefix is not None else 0
        process, text = _process(line[:at]), line[at:]
        if text.rstrip().endswith(TRACEBACK):
            # What an engine only warns of has not ended it.
            if not _HARMLESS.search(line[:at]):
                within.add(process)
        elif process in within and text.strip() and not text[0].isspace():
            within.discard(process)
            if (match := _RAISED.match(text)) is not None:
                yield _named(match)


def _process(prefix: str) -> str:
    """Return what of a prefix tells processes apart."""
    return "".join(re.findall(r"pid=\d+|rank\d+|\b[TPD]P\d+", prefix))


def _named(match: re.Match[str]) -> str:
    return match["name"] + (f": {match['text'].strip()}" if match["text"] else "")
