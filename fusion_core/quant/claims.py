"""Claim of a quantisation config on one projection, and the typed reading that all parsers share.

Every function that reads a value raises Doubt where it is of another kind, and takes null for nothing said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


class Doubt(Exception):
    """Error: something in a quantisation config is not known; the text says what."""


@dataclass(frozen=True)
class Claim:
    """Storage of one projection, as a config has it.

    Args:
        format: "plain", "fp8-block", "int4-gptq", ...; `methods.LAYOUTS` has those whose tensors are known.
        bits: of a packed weight; 0 where a weight has one number an element.
        group: rows and columns of the weight [out, in] that share a scale; 0 stands for all of them.
        needs, lacks: suffixes that must, and must not, be stored.
        inputs: tokens and columns of the activations that share a scale, where kernels round these to FP8;
            0 stands for all of them, None for activations that stay as they are.
        details: what headers cannot show (symmetry, activations, order), as words.
    """

    format: str
    bits: int = 0
    group: tuple[int, int] = (0, 0)
    needs: frozenset[str] = frozenset()
    lacks: frozenset[str] = frozenset()
    inputs: tuple[int, int] | None = None
    details: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows, columns = self.group
        size = f"block {rows}x{columns}" if rows > 1 else f"group {columns}" if columns else ""
        return ", ".join(word for word in (self.format, size, *self.details) if word)


PLAIN = Claim("plain")
# Module name without "weight" -> what the config says of it. Raises Doubt.
Resolver = Callable[[str], Claim]
Section = Mapping[str, Any]


def all_plain(_: str) -> Claim:
    """Resolve every module of a checkpoint that declares no quantisation."""
    return PLAIN


def refuse_unknown_keys(section: Section, known: Iterable[str], where: str = "") -> None:
    """Raise Doubt at a key that means something we do not know; null values say nothing."""
    unknown = sorted(str(k) for k, v in section.items() if k not in known and v is not None)
    if unknown:
        raise Doubt(f"the key {where + unknown[0]!r} is not known")


def whole(section: Section, key: str, default: int | None = None, low: int = 0) -> int:
    """Read the whole number under ``key``, at least ``low``."""
    value = section.get(key)
    value = default if value is None else value
    if type(value) is not int or not low <= value < 1 << 24:
        raise Doubt(f"'{key}' is {value!r}, no whole number from {low}")
    return value


def flag(section: Section, key: str, default: bool) -> bool:
    """Read the boolean under ``key``."""
    value = section.get(key)
    value = default if value is None else value
    if type(value) is not bool:
        raise Doubt(f"'{key}' is {value!r}, neither true nor false")
    return value


def word(section: Section, key: str, default: str, among: Iterable[str] = ()) -> str:
    """Read the string under ``key`` in lower case; with ``among``, one of these."""
    value = section.get(key)
    value = default if value is None else value
    if type(value) is not str or (among and value.lower() not in among):
        raise Doubt(f"'{key}' is {value!r}, which is not known")
    return value.lower()


def names(section: Section, *keys: str) -> tuple[str, ...]:
    """Read all strings in the lists under ``keys``; lists of lists count as one."""
    strings: list[str] = []
    for key in keys:
        stack = [section.get(key)]
        while stack:
            value = stack.pop()
            if isinstance(value, list):
                stack.extend(value)
            elif isinstance(value, str):
                strings.append(value)
            elif value is not None:
                raise Doubt(f"'{key}' holds {value!r}, which is no name")
    return tuple(strings)


def mapping(section: Section, key: str) -> Section:
    """Read the object under ``key``; empty where there is none."""
    value = section.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Doubt(f"'{key}' is {value!r}, no object")
    return value
