"""Child processes are patched through their environment: set what they read, and put it back."""

from __future__ import annotations

import os
from collections.abc import Mapping

from .settings import ENABLE, engines_in

_before: dict[str, str | None] = {}
_engines: list[str] = []


def _set(name: str, value: str) -> None:
    if os.environ.get(name) != value:
        _before.setdefault(name, os.environ.get(name))
        os.environ[name] = value


def _write_engines() -> None:
    base = _before.get(ENABLE, os.environ.get(ENABLE)) or ""
    named = engines_in(base)
    if missing := sorted(set(_engines) - named):
        _set(ENABLE, ",".join([*sorted(named), *missing]))
    elif ENABLE in _before:
        _set(ENABLE, base)


def switch_on(engine: str, options: Mapping[str, bool | None]) -> None:
    """Make child processes patch ``engine`` too, with the options that are not None."""
    if engine not in _engines:
        _engines.append(engine)
    _write_engines()
    for name, value in options.items():
        if value is not None:
            _set(name, "1" if value else "0")


def switch_off(engine: str) -> None:
    """Take back what `switch_on` did; after the last engine, the environment is as it was."""
    if engine not in _engines:
        return
    _engines.remove(engine)
    if _engines:
        _write_engines()
        return
    for name, value in _before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _before.clear()
