"""How the canary reads weights of packed integers: [out, in], float64, (number - zero) * scale.

Numbers lie in words of 32 bits, the first one in the lowest bits. Where a config and its tensors disagree,
there is no reference: engines take one of the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...errors import NoReference
from .claims import Claim

if TYPE_CHECKING:
    # Headers are read without torch.
    import torch

# The column, of eight in a row, of each number in a word of AWQ.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# Words of `Claim.details`.
SYMMETRIC, ZERO_POINTS, SECOND = "symmetric", "zero points", "gptq_v2"


def numbers(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack int32 [..., n] to [..., n * 32 / bits], each number from 0 to 2^bits - 1."""
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    parts: torch.Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return parts.flatten(-2)


def gptq(stored: Mapping[str, torch.Tensor], claim: Claim, dtype: torch.dtype) -> torch.Tensor:
    """Read GPTQ's packing: along the input; zero points along the output, less one but in its second layout.

    Args:
        dtype: that of the model, in which engines hold scales.

    Raises:
        NoReference: zero points of a symmetric weight are not in the middle.
    """
    number = numbers(stored["qweight"].t(), claim.bits)
    zero = numbers(stored["qzeros"], claim.bits).t() + (0 if SECOND in claim.details else 1)
    if SYMMETRIC in claim.details and bool((zero != 2 ** (claim.bits - 1)).any()):
        raise NoReference("zero points are stored that are not those of a symmetric weight")
    return _weight(number, zero, stored["scales"].t(), stored.get("g_idx"), dtype)


def awq(stored: Mapping[str, torch.Tensor], claim: Claim, dtype: torch.dtype) -> torch.Tensor:
    """Read AWQ's packing of 4 bits: along the output, in an order of its own; arguments as of `gptq`.

    Raises:
        NoReference: the config says that there are no zero points, which are stored.
    """
    if ZERO_POINTS not in claim.details:
        raise NoReference("AWQ without zero points: engines differ in what they take for them")
    number, zero = (_in_order(numbers(stored[name], claim.bits)).t() for name in ("qweight", "qzeros"))
    return _weight(number, zero, stored["scales"].t(), None, dtype)


def compressed(stored: Mapping[str, torch.Tensor], claim: Claim, dtype: torch.dtype) -> torch.Tensor:
    """Read the packing of compressed-tensors: along the input; zero points along the output; as `gptq`.

    Raises:
        NoReference: ``weight_shape`` is not that of the weight.
    """
    import torch

    number = numbers(stored["weight_packed"], claim.bits)
    if stored["weight_shape"].tolist() != list(number.shape):
        raise NoReference(f"weight_shape is {stored['weight_shape'].tolist()}, not {list(number.shape)}")
    zero = torch.tensor(2 ** (claim.bits - 1))
    if (points := stored.get("weight_zero_point")) is not None:
        zero = numbers(points.t(), claim.bits).t()
    return _weight(number, zero, stored["weight_scale"], stored.get("weight_g_idx"), dtype)


def _in_order(rows: torch.Tensor) -> torch.Tensor:
    """Put columns of AWQ in their places."""
    places = [AWQ_ORDER.index(column) for column in range(len(AWQ_ORDER))]
    return rows.reshape(len(rows), -1, len(AWQ_ORDER))[..., places].flatten(1)


def _weight(
    number: torch.Tensor,
    zero: torch.Tensor,
    scale: torch.Tensor,
    index: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return (number - zero) * scale, [out, in] float64.

    Args:
        zero: [out, groups], or one for all; scale: [out, groups].
        index: [in], the group of each column; None: groups in a row.
    """
    import torch

    columns, groups = number.shape[1], scale.shape[1]
    if index is None:
        index = torch.arange(columns) // -(-columns // groups)
    elif int(index.min()) < 0 or int(index.max()) >= groups:
        raise NoReference(f"a column is of group {int(index.max())}, and there are {groups}")
    index = index.long()
    points = zero if zero.ndim == 0 else zero[:, index]
    return (number - points).double() * scale.to(dtype).double()[:, index]
