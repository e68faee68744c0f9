"""Matching of module names with lists: whole dotted components, globs and regexes, never substrings."""

from __future__ import annotations

import fnmatch
import importlib
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

from .claims import Doubt

# The parser of Python's regexes moved in 3.11; what it returns did not change.
_NEW = sys.version_info >= (3, 11)
sre_parse: Any = importlib.import_module("re._parser" if _NEW else "sre_parse")
sre_constants: Any = importlib.import_module("re._constants" if _NEW else "sre_constants")

Matcher = Callable[[str], bool]
REGEX = "re:"
# Ways to try one name that a whole list may cost: regexes come from the checkpoint, and must not hang us.
_MAX_WAYS = 250_000
_NAME_LENGTH, _NUMBER_LENGTH = 60, 4
_ONE_WAY = {
    getattr(sre_constants, name)
    for name in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT", "CATEGORY", "RANGE")
}


def dotted(entries: Iterable[str]) -> Matcher:
    """Match a run of whole components anywhere in the name: "mlp.gate" is none of "mlp.gate_proj"."""
    stripped = {entry.strip(".") for entry in entries} - {""}
    longest = max((entry.count(".") + 1 for entry in stripped), default=0)

    @lru_cache(maxsize=1 << 16)
    def below(name: str) -> bool:
        # Runs that end with the last component; those that end before are the parent's.
        parent, _, last = name.rpartition(".")
        if parent and below(parent):
            return True
        run = last
        for _ in range(longest):
            if run in stripped:
                return True
            if not parent:
                return False
            parent, _, last = parent.rpartition(".")
            run = f"{last}.{run}"
        return False

    return below if stripped else never


def ending(entries: Iterable[str]) -> Matcher:
    """Match the last whole components of the name."""
    stripped = {entry.strip(".") for entry in entries} - {""}

    def ends(name: str) -> bool:
        while name:
            if name in stripped:
                return True
            name = name.partition(".")[2]
        return False

    return ends


def exact(entries: Iterable[str]) -> Matcher:
    """Match the whole name."""
    return frozenset(entries).__contains__


def globs(entries: Iterable[str]) -> Matcher:
    """Match the name, or a module that holds it, with entries that may have * and ?."""
    plain: list[str] = []
    patterns: list[str] = []
    for entry in entries:
        (patterns if any(c in entry for c in "*?[") else plain).append(entry)
    for pattern in patterns:
        if pattern.count("*") > 3:
            raise Doubt(f"the pattern {pattern!r} has too many wildcards")
    listed = dotted(plain)
    try:
        compiled = [re.compile(fnmatch.translate(p)) for p in patterns]
    except re.error as error:
        raise Doubt(f"a pattern in {patterns} is none ({error})") from None
    if not compiled:
        return listed

    @lru_cache(maxsize=1 << 16)
    def covered(name: str) -> bool:
        parent = name.rpartition(".")[0]
        return any(p.match(name) for p in compiled) or (bool(parent) and covered(parent))

    return lambda name: listed(name) or covered(name)


def regexes(entries: Iterable[str], search: bool = False) -> Matcher:
    """Match regexes from the start of the name (``search``: anywhere in it).

    Raises:
        Doubt: one is no regex, or could take very long.
    """
    patterns = list(entries)
    # A search starts at every place of the name.
    if sum(map(ways, patterns)) * (_NAME_LENGTH if search else 1) > _MAX_WAYS:
        raise Doubt(f"the regexes from {patterns[0]!r} on could take too long")
    compiled = [re.compile(p) for p in patterns]
    tries = [p.search if search else p.match for p in compiled]
    return (lambda name: any(t(name) for t in tries)) if tries else never


def mixed(entries: Iterable[str], plain: Callable[[Iterable[str]], Matcher]) -> Matcher:
    """Match entries that start with "re:" as regexes, the others by ``plain``."""
    rest, patterns = [], []
    for entry in entries:
        if entry.startswith(REGEX):
            patterns.append(entry.removeprefix(REGEX))
        else:
            rest.append(entry)
    first, second = plain(rest), regexes(patterns)
    return lambda name: first(name) or second(name)


def never(_: str) -> bool:
    """Match nothing."""
    return False


def ways(pattern: str) -> int:
    """Bound the number of ways to try ``pattern`` on one module name.

    Raises:
        Doubt: it is no regex, or has choices inside a repeat, where the ways are beyond counting.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = list(sre_parse.parse(pattern))
            re.compile(pattern)
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise Doubt(f"{pattern!r} is no regex ({error})") from None
    # One character over and over at the end, such as ".*", is never tried a second way.
    while tree and tree[-1][0] is sre_constants.MAX_REPEAT and _one_way(list(tree[-1][1][2])):
        tree.pop()
    try:
        return _ways(tree)
    except (RecursionError, Doubt):
        raise Doubt(f"the regex {pattern!r} could take too long") from None


def _ways(tree: Iterable[Any], repeated: bool = False) -> int:
    total = 1
    for operation, argument in tree:
        if operation in (sre_constants.MAX_REPEAT, sre_constants.MIN_REPEAT):
            low, high, body = argument
            if repeated and low != high:
                raise Doubt
            length = _NUMBER_LENGTH if _digits_only(list(body)) else _NAME_LENGTH
            total *= _ways(body, repeated or high > 1) * (min(high, length) - min(low, length) + 1)
        elif operation is sre_constants.BRANCH:
            if repeated:
                raise Doubt
            branches = [_ways(branch) for branch in argument[1]]
            # Of plain words at most one is there; what repeats adds its ways to the others'.
            total *= sum(branches) if max(branches) > 1 else 1
        elif operation is sre_constants.SUBPATTERN:
            total *= _ways(argument[-1], repeated)
        elif operation in (sre_constants.ASSERT, sre_constants.ASSERT_NOT):
            total *= _ways(argument[1], repeated)
        elif operation not in _ONE_WAY:
            raise Doubt
        total = min(total, 1 << 60)
    return total


def _one_way(body: list[Any]) -> bool:
    return len(body) == 1 and body[0][0] in _ONE_WAY


def _digits_only(body: list[Any]) -> bool:
    if len(body) != 1 or body[0][0] is not sre_constants.IN:
        return False
    return all(
        item
        in (
            (sre_constants.CATEGORY, sre_constants.CATEGORY_DIGIT),
            (sre_constants.RANGE, (ord("0"), ord("9"))),
        )
        for item in body[0][1]
    )
