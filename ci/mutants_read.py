"""Mutants as mutmut left them, how each ended, and those that are explained as equal to the original."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import unified_diff
from pathlib import Path
from typing import Any

import yaml

Identity = tuple[str, str, str, str]
ENTRY = ("file", "function", "line", "mutant")
CAUGHT, BY_TIME, SURVIVED, NO_TEST, NOT_RUN = "caught", "by time", "survived", "no test", "not run"
# Of pytest: 0 where all tests pass, 5 where there is none; of mutmut: 33 where no test calls the function. A
# process that was ended at its limit has the number of a signal. All else is a test or an import that failed.
ENDED = {
    None: NOT_RUN,
    0: SURVIVED,
    5: NO_TEST,
    33: NO_TEST,
    -24: BY_TIME,
    24: BY_TIME,
    152: BY_TIME,
    -9: BY_TIME,
}


@dataclass(frozen=True)
class Mutant:
    """One change of a function: ``line`` as it was, ``mutant`` as it is, and how its tests ended."""

    name: str
    file: str
    function: str
    line: str
    mutant: str
    diff: str
    state: str

    @property
    def caught(self) -> bool:
        """Return whether a test failed or did not end."""
        return self.state in (CAUGHT, BY_TIME)

    @property
    def identity(self) -> Identity:
        """Return what it changes: the same after other changes of the file."""
        return self.file, self.function, self.line, self.mutant


class BadEntryError(Exception):
    """An explanation that cannot be read."""


def read_codes(made: Path) -> dict[Path, dict[str, int | None]]:
    """Return how the mutants of each file ended, as mutmut notes it."""
    return {
        meta: json.loads(meta.read_text())["exit_code_by_key"] for meta in sorted(made.rglob("*.py.meta"))
    }


def forget_missed(made: Path) -> None:
    """Have mutants that were not caught run again."""
    for meta, codes in read_codes(made).items():
        known = json.loads(meta.read_text())
        known["exit_code_by_key"] = {
            name: code if ENDED.get(code, CAUGHT) in (CAUGHT, BY_TIME) else None
            for name, code in codes.items()
        }
        meta.write_text(json.dumps(known))


def read_mutants(made: Path) -> list[Mutant]:
    """Return every mutant of the folder that mutmut made."""
    return [mutant for meta, codes in read_codes(made).items() for mutant in _of_file(made, meta, codes)]


def _of_file(made: Path, meta: Path, codes: dict[str, int | None]) -> Iterable[Mutant]:
    source = meta.with_suffix("")
    if not codes:
        return
    lines = source.read_text(encoding="utf-8").splitlines()
    spans = json.loads(Path(f"{source}.spans").read_text())["spans"]
    file = source.relative_to(made).as_posix().removeprefix("fse_patch/")
    for name, code in codes.items():
        made_name = name.rpartition(".")[2]
        mangled = made_name.partition("__mutmut_")[0]
        function = mangled.removeprefix("x_") if mangled.startswith("x_") else mangled[2:].replace("ǁ", ".")
        plain = function.rpartition(".")[2]
        before = _source(lines, spans[f"{mangled}__mutmut_orig"], f"{mangled}__mutmut_orig", plain)
        after = _source(lines, spans[made_name], made_name, plain)
        diff = "\n".join(list(unified_diff(before, after, lineterm="", n=1))[3:])
        line, mutant = changed(before, after)
        yield Mutant(name, file, function, line, mutant, diff, ENDED.get(code, CAUGHT))


def _source(lines: list[str], span: tuple[int, int], made_name: str, function: str) -> list[str]:
    """Return the lines of a function, under its own name; its decorators are mutmut's."""
    part = lines[span[0] - 1 : span[1]]
    start = next(i for i, line in enumerate(part) if made_name in line and "def " in line)
    return [line.replace(made_name, function) for line in part[start:]]


def changed(before: list[str], after: list[str]) -> tuple[str, str]:
    """Return the lines that differ, as one line; with the line above where they are there more than once."""
    shorter = min(len(before), len(after))
    first = next((i for i in range(shorter) if before[i] != after[i]), shorter)
    left = shorter - first
    last = next((i for i in range(left) if before[-1 - i] != after[-1 - i]), left)
    while first and _times(before, before[first : len(before) - last]) > 1:
        first -= 1
    return _one_line(before[first : len(before) - last]), _one_line(after[first : len(after) - last])


def _times(lines: list[str], part: list[str]) -> int:
    """Count where a part of a function stands in it, but for its indent."""
    plain, looked_for = [line.strip() for line in lines], [line.strip() for line in part]
    return (
        sum(plain[i : i + len(part)] == looked_for for i in range(len(plain) - len(part) + 1)) if part else 0
    )


def _one_line(lines: Iterable[str]) -> str:
    return " ".join(" ".join(lines).split())


def read_explained(path: Path) -> dict[Identity, str]:
    """Return the mutants that are explained, each with why.

    Raises:
        BadEntryError: an entry lacks a part, or stands there twice.
    """
    groups = yaml.safe_load(path.read_text(encoding="utf-8")) or []
    explained: dict[Identity, str] = {}
    for group in groups:
        why, entries = _parts(path, group, ("why", "mutants"))
        for entry in entries:
            file, function, line, mutant = (_one_line([str(part)]) for part in _parts(path, entry, ENTRY))
            if (key := (file, function, line, mutant)) in explained:
                raise BadEntryError(f"{path.name}: stands there twice: {entry}")
            explained[key] = str(why)
    return explained


def _parts(path: Path, entry: Any, names: tuple[str, ...]) -> list[Any]:
    if not isinstance(entry, dict) or set(entry) != set(names) or not all(entry.values()):
        raise BadEntryError(f"{path.name}: needs {', '.join(names)}: {entry}")
    return [entry[name] for name in names]


def sample(mutants: list[Mutant], number: int, seed: str) -> list[Mutant]:
    """Return so many mutants, the same ones for the same seed; another mutant in a file moves few of them."""

    def rank(mutant: Mutant) -> str:
        return hashlib.sha256("\0".join((seed, *mutant.identity, mutant.name)).encode()).hexdigest()

    return sorted(mutants, key=rank)[:number]


def table(mutants: list[Mutant], explained: Iterable[Identity]) -> list[str]:
    """Return a row for each file, and one for all."""
    rows: dict[str, list[Mutant]] = {}
    for mutant in mutants:
        rows.setdefault(mutant.file, []).append(mutant)
    width = max([len(file) for file in rows] + [4])
    words = f"{'mutants':>8} {'caught':>8} {'by time':>8} {'explained':>10} {'survived':>9} {'%':>6}"
    head = f"{'file':{width}} {words}"
    known = set(explained)
    return [head, *(_row(file, of, known, width) for file, of in [*rows.items(), ("all", mutants)])]


def _row(name: str, mutants: list[Mutant], explained: set[Identity], width: int) -> str:
    states = [mutant.state for mutant in mutants]
    caught, by_time = states.count(CAUGHT), states.count(BY_TIME)
    equal = sum(not mutant.caught and mutant.identity in explained for mutant in mutants)
    left = len(mutants) - equal
    rate = f"{100 * (caught + by_time) / left:.1f}" if left else "-"
    survived = left - caught - by_time
    return (
        f"{name:{width}} {len(mutants):8} {caught + by_time:8} {by_time:8} {equal:10} {survived:9} {rate:>6}"
    )
