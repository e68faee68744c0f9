"""Integers of 4 or 8 bits, packed into 32-bit ones: what the methods that store these have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .claims import Claim, Doubt, Section, whole
from .layouts import INT32, PLAIN_DTYPES, Stored
from .records import Format

BITS = (4, 8)
# Bits -> dtype in the names of tuned tables; nobody fuses 8-bit integers.
TABLE_DTYPES: Mapping[int, str | None] = {4: "int4_w4a16", 8: None}
# As GPTQ and AWQ store them: one for every group of the input and channel of the output.
GROUP_SCALES = Stored(PLAIN_DTYPES, ("in/cols out",))
GROUP_ZEROS = Stored(INT32, ("in/cols out/pack",))


def integer_claim(
    formats: Mapping[int, Format], section: Section, sizes: tuple[str, str], details: Iterable[str]
) -> Claim:
    """Read the bits and the group size of ``section``.

    Args:
        formats: number of bits -> format.
        sizes: keys of the number of bits and of the group size.
        details: what headers cannot show.

    Raises:
        Doubt: no format has so many bits, or the group size is none.
    """
    bits, group = whole(section, sizes[0]), whole(section, sizes[1], -1, low=-1)
    if bits not in formats or group == 0:
        raise Doubt(f"{bits} bits in groups of {group} are not known")
    # -1 is how these formats say "one group a row".
    return Claim(formats[bits].name, bits, (1, max(group, 0)), details=tuple(details))
