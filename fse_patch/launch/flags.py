"""The flags of an engine's server, as its own parser takes them: patches/<engine>.flags.json."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection
from functools import cache
from typing import Any, Literal, NoReturn

from pydantic import Field

from ..errors import FsePatchError, did_you_mean
from ..fusion_core.data_file import Release, Strict, Text, check
from ..patches import FOLDER

# What a flag takes, as argparse makes it.
_ACTIONS: dict[str, dict[str, Any]] = {
    "nothing": {"action": "store_true"},
    "yes_no": {"action": argparse.BooleanOptionalAction},
    "one": {},
    "one_each": {"action": "append"},
    "maybe": {"nargs": "?", "const": True},
    "some": {"nargs": "+"},
    "any": {"nargs": "*"},
}


class Flag(Strict):
    """One flag; a positional argument has no names.

    Args:
        to: where the parser puts its value.
        releases: those that have it; all that were asked if None.
    """

    names: list[Text]
    to: Text
    takes: Literal["nothing", "yes_no", "one", "one_each", "maybe", "some", "any"]
    releases: list[Release] | None = None


class Flags(Strict):
    """All flags of the releases that were asked."""

    releases: list[Release]
    flags: list[Flag] = Field(min_length=1)


@cache
def flags_of(engine: str) -> Flags:
    """Read the flags of an engine."""
    path = FOLDER / f"{engine}.flags.json"
    return check(path, Flags, json.loads(path.read_text(encoding="utf-8")))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise FsePatchError(message)


def parser_of(engine: str, release: str) -> argparse.ArgumentParser:
    """Return a parser that takes a command line apart as the engine's own does.

    Args:
        release: of the engine. One that was not asked has the flags of all that were.
    """
    data = flags_of(engine)
    asked = release in data.releases
    parser = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    taken: set[str] = set()
    for flag in data.flags:
        if asked and flag.releases is not None and release not in flag.releases:
            continue
        if not flag.names:
            parser.add_argument(flag.to, nargs="?", default=argparse.SUPPRESS)
            continue
        # Releases may differ in what a flag takes: the newest one's way goes first in the file.
        names = [name for name in flag.names if name not in taken and not name.startswith("--no-")]
        if names:
            taken |= {*names, *(name for name in flag.names if name.startswith("--no-"))}
            parser.add_argument(*names, dest=flag.to, default=argparse.SUPPRESS, **_ACTIONS[flag.takes])
    return parser


def unknown_flag(engine: str, release: str, word: str) -> FsePatchError:
    """Return the error for a word that no flag is."""
    data = flags_of(engine)
    names = [name for flag in data.flags for name in flag.names]
    where = f"{engine} {release}" if release in data.releases else f"{engine} {', '.join(data.releases)}"
    alike = did_you_mean(word.partition("=")[0], names)
    meant = f"; {alike}" if alike.startswith("did") else ""
    return FsePatchError(f"{word}: no flag of {where}{meant}")


def check_arguments(engine: str, release: str, names: Collection[str]) -> None:
    """Look for engine arguments that there are not, by their names in Python: tensor_parallel_size.

    Of a release whose flags are not known, nothing is said.

    Raises:
        FsePatchError: the release has no such argument.
    """
    data = flags_of(engine)
    if release.partition("+")[0] not in data.releases:
        return
    known = {flag.to for flag in data.flags}
    for name in names:
        if name not in known:
            alike = did_you_mean(name, sorted(known))
            meant = f"; {alike}" if alike.startswith("did") else ""
            raise FsePatchError(f"--engine-args: {engine} {release} has no argument {name!r}{meant}")
