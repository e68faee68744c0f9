"""Which tensors a format stores for one projection, as data, and how stored ones differ from that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..checkpoint.headers import TensorHeader
from .claims import Claim

_PLAIN = frozenset({"BF16", "F16", "F32"})
_FP8 = frozenset({"F8_E4M3", "F8_E4M3FNUZ"})
_INTS = frozenset({"I32"})


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


_SCALAR = ("", "1")
_WEIGHT8 = Stored(_FP8, ("out in",))
_INPUT_SCALE = Stored(_PLAIN, _SCALAR, optional=True)


def _integers(bits: int) -> dict[str, Mapping[str, Stored]]:
    return {
        f"int{bits}-gptq": {
            "qweight": Stored(_INTS, ("in/pack out",)),
            "qzeros": Stored(_INTS, ("in/cols out/pack",)),
            "scales": Stored(_PLAIN, ("in/cols out",)),
            "g_idx": Stored(_INTS, ("in",), optional=True),
        },
        f"int{bits}-awq": {
            "qweight": Stored(_INTS, ("in out/pack",)),
            "qzeros": Stored(_INTS, ("in/cols out/pack",)),
            "scales": Stored(_PLAIN, ("in/cols out",)),
        },
        f"int{bits}-packed": {
            "weight_packed": Stored(_INTS, ("out in/pack",)),
            "weight_scale": Stored(_PLAIN, ("out in/cols",)),
            "weight_shape": Stored(frozenset({"I64", "I32"}), ("2",)),
            "weight_zero_point": Stored(_INTS, ("out/pack in/cols",), optional=True),
            "weight_g_idx": Stored(_INTS, ("in",), optional=True),
        },
    }


# Format -> suffix -> tensor; "a|b" are two names for one. A format that is not here is never fused.
LAYOUTS: Mapping[str, Mapping[str, Stored]] = {
    "plain": {"weight": Stored(_PLAIN, ("out in",))},
    "fp8-block": {
        "weight": _WEIGHT8,
        "weight_scale_inv|weight_scale": Stored(_PLAIN, ("out/rows in/cols",)),
    },
    "fp8-channel": {
        "weight": _WEIGHT8,
        "weight_scale": Stored(_PLAIN, ("out 1", "out")),
        "input_scale": _INPUT_SCALE,
    },
    "fp8-tensor": {
        "weight": _WEIGHT8,
        "weight_scale": Stored(_PLAIN, _SCALAR),
        "input_scale": _INPUT_SCALE,
    },
    "int8-channel": {
        "weight": Stored(frozenset({"I8"}), ("out in",)),
        "weight_scale": Stored(_PLAIN, ("out 1", "out")),
        "input_scale": _INPUT_SCALE,
    },
    **_integers(4),
    **_integers(8),
}

# Formats whose weight times its scale is the projection: the canary reads these and no others.
READABLE = frozenset({"plain", "fp8-block", "fp8-channel", "fp8-tensor"})


def contradiction(claim: Claim, stored: Mapping[str, TensorHeader], out: int, inner: int) -> str:
    """What of one projection's tensors cannot be as ``claim`` says, or "".

    Args:
        claim: of a format in LAYOUTS.
        stored: suffix -> header of one expert.
        out, inner: sizes of the weight [out, inner].
    """
    for names, tensor in LAYOUTS[claim.format].items():
        found = [name for name in names.split("|") if name in stored]
        wanted = not tensor.optional or names in claim.needs
        if not found and wanted:
            return f"{names.replace('|', ' or ')} is missing"
        for name in found:
            header = stored[name]
            if name in claim.lacks:
                return f"{name} is there"
            if header.dtype not in tensor.dtypes:
                return f"{name} is {header.dtype}"
            shapes = [_shape(words, claim, out, inner) for words in tensor.shapes]
            if header.shape not in shapes:
                return f"{name} is {list(header.shape)}, not {list(shapes[0] or ())}"
    return ""


def foreign(claim: Claim, stored: Mapping[str, TensorHeader]) -> str:
    """A stored suffix that ``claim``'s format does not have, or ""."""
    known = {name for names in LAYOUTS[claim.format] for name in names.split("|")}
    return min(stored.keys() - known, default="")


def _shape(words: str, claim: Claim, out: int, inner: int) -> tuple[int, ...] | None:
    """The shape that ``words`` stand for; None where the weight does not pack evenly."""
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
