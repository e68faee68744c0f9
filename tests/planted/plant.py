"""How a fault is planted: a function of the engine's name gives a context to start the engine in."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

Plant = Callable[[str], AbstractContextManager[Any]]
PLANTS: dict[str, Plant] = {}


def plant(function: Plant) -> Plant:
    """Register a fault under its function's name."""
    assert function.__name__ not in PLANTS
    PLANTS[function.__name__] = function
    return function


def adapter(engine: str, module: str) -> Any:
    """A module of the engine's adapter."""
    return importlib.import_module(f"fse_patch.adapters.{engine}.{module}")
