"""Tiles that fit the device: as many stages of loads as it has shared memory for.

Tiles were timed on an H200, where a block may have 227 KiB of shared memory. Others have 163 KiB (A100),
99 KiB (L40S, RTX, GB10) or 64 KiB (MI300X). What a tile needs is known when its kernel has been compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace

from triton import OutOfResources

from .once_tiles import Tile

# The tiles that fit, by those that do not and by what was launched with them.
_FITTING: dict[Hashable, Tile] = {}


def launch_fitting(launch: Callable[[Tile], object], tile: Tile, what: Callable[[], Hashable]) -> None:
    """Launch with ``tile``, or with fewer stages where the device does not have the memory.

    The proof at start goes through it first: a tile is sought while nothing is served.

    Args:
        what: returns all beside the tile that makes another kernel of it; the device among it.

    Raises:
        OutOfResources: it does not fit without any stages either.
    """
    full = tile
    if _FITTING:  # where all fits, launches go on at once
        tile = _FITTING.get((full, what()), full)
    while True:
        try:
            launch(tile)
            return
        except OutOfResources as error:
            _FITTING[full, what()] = tile = fewer_stages(tile, error)


def fewer_stages(tile: Tile, error: OutOfResources) -> Tile:
    """Return the tile with as many stages as the memory is probably enough for, at least one less.

    Raises:
        OutOfResources: there are none to leave out.
    """
    share = error.limit / error.required

    def less(one: Tile) -> Tile:
        return replace(one, stages=max(1, min(one.stages - 1, int(one.stages * share))))

    fewer = replace(less(tile), shared=None if tile.shared is None else less(tile.shared))
    if fewer == tile:
        raise error
    return fewer
