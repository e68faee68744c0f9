"""Tensors that a format stores for one projection, and how those of a checkpoint differ from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..checkpoint.headers import TensorHeader
from .claims import Claim

# dtypes as safetensors names them.
PLAIN_DTYPES = frozenset({"BF16", "F16", "F32"})
FP8_DTYPES = frozenset({"F8_E4M3", "F8_E4M3FNUZ"})
INT32 = frozenset({"I32"})


@dataclass(frozen=True)
class Stored:
    """One tensor of a projection.

    Args:
        shapes: allowed ones, in words of the weight [out, in]: "pack" is the number of weights in an
            integer, "rows" and "cols" the size of a group that shares a scale. "" is a 0-d tensor.
        optional: may be missing.
    """

    dtypes: frozenset[str]
    shapes: tuple[str, ...]
    optional: bool = False


# Suffix -> tensor; "a|b" are two names for one.
Layout = Mapping[str, Stored]

# Tensors that several formats have.
FP8_WEIGHT = Stored(FP8_DTYPES, ("out in",))
ONE_SCALE = Stored(PLAIN_DTYPES, ("", "1"))
CHANNEL_SCALES = Stored(PLAIN_DTYPES, ("out 1", "out"))
INPUT_SCALE = Stored(PLAIN_DTYPES, ("", "1"), optional=True)


def contradiction(
    layout: Layout, claim: Claim, stored: Mapping[str, TensorHeader], out: int, inner: int
) -> str:
    """Say what of one projection's tensors cannot be as ``claim`` says, or "".

    Args:
        layout: of the claim's format.
        stored: suffix -> header of one expert.
        out, inner: sizes of the weight [out, inner].
    """
    for names, tensor in layout.items():
        there = [name for name in names.split("|") if name in stored]
        required = not tensor.optional or names in claim.needs
        if not there and required:
            return f"{names.replace('|', ' or ')} is missing"
        for name in there:
            header = stored[name]
            if name in claim.lacks:
                return f"{name} is there"
            if header.dtype not in tensor.dtypes:
                return f"{name} is {header.dtype}"
            shapes = [_shape(words, claim, out, inner) for words in tensor.shapes]
            if header.shape not in shapes:
                return f"{name} is {list(header.shape)}, not {list(shapes[0] or ())}"
    return ""


def foreign(layout: Layout, stored: Mapping[str, TensorHeader]) -> str:
    """Name a stored suffix that ``layout`` does not have, or ""."""
    return min(stored.keys() - suffixes(layout), default="")


def suffixes(layout: Layout) -> set[str]:
    """List all names that tensors of ``layout`` may have."""
    return {name for names in layout for name in names.split("|")}


def _shape(words: str, claim: Claim, out: int, inner: int) -> tuple[int, ...] | None:
    """Read ``words`` as a shape; None where the weight does not pack evenly."""
    rows, columns = claim.group
    pack = 32 // claim.bits if claim.bits else 1
    if ("out/pack" in words and out % pack) or ("in/pack" in words and inner % pack):
        return None
    sizes = {
        "out": out,
        "in": inner,
        "out/pack": out // pack,
        "in/pack": inner // pack,
        # The last block may be a partial one.
        "out/rows": -(-out // (rows or out)),
        "in/cols": -(-inner // (columns or inner)),
    }
    return tuple(sizes[w] if w in sizes else int(w) for w in words.split())
