"""A family's MoE block in the running engine, as patches/families/ describes it."""

from __future__ import annotations

from importlib import import_module
from operator import attrgetter
from typing import Any

from ..adapters.patching.engine_families import block_of
from ..adapters.patching.source import split


def build_block(engine: str, family: str, engine_config: Any, **common: Any) -> Any:
    """Build the block that models of ``family`` have.

    Args:
        engine_config: the engine's configuration, of which the block gets what its family file names.
        common: arguments that every block of the engine gets.

    Raises:
        FsePatchError: the family has no block in this engine.
    """
    block = block_of(engine, family)
    module, name = split(block.reference)
    paths = block.from_config.items()
    read = {key: engine_config if path == "." else attrgetter(path)(engine_config) for key, path in paths}
    return getattr(import_module(module), name)(**common, **block.arguments, **read)
