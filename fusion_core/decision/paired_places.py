"""Places where the paired layout was run (patches/paired.yaml): only there `auto` takes it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from ...patches import FOLDER, Engine, Platform
from ..data_file import Strict, Text, check, parse
from ..reasons import Reason

PLACES_FILE = FOLDER / "paired.yaml"
_EVERY = "*"


class Place(Strict):
    """An engine on a device; "*" stands for every device of the platform.

    Args:
        packed: experts packed as integers were run there too.
    """

    engine: Engine
    platform: Platform
    device: Text
    packed: bool = False


class _Places(Strict):
    ran: list[Place]


@cache
def places(path: Path = PLACES_FILE) -> tuple[Place, ...]:
    """Read the list.

    Raises:
        FsePatchError: the file is malformed; file and field are named.
    """
    return tuple(check(path, _Places, parse(path)).ran)


def unrun(
    engine: str,
    platform: str,
    device: str,
    packed: bool = False,
    known: tuple[Place, ...] | None = None,
) -> Reason | None:
    """Return the refusal of a place where nobody has run the paired layout, None where somebody has.

    Args:
        platform: as `fse-patch plan` takes it.
        packed: whether experts are packed as integers.
        known: in place of the shipped list.
    """
    here = [
        place
        for place in (places() if known is None else known)
        if (place.engine, place.platform) == (engine, platform) and place.device in (device, _EVERY)
    ]
    if any(place.packed or not packed for place in here):
        return None
    what = "packed experts of " if here else ""
    return Reason("device.unrun", f"nobody has run {what}{engine} paired on {device or 'this device'} yet")
