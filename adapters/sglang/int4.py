"""4-bit routed experts of SGLang: where each of its schemes keeps what it made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from ...fusion_core.kernels.expert_weights import ExpertWeights
from ...fusion_core.quant.built_int4 import BuiltInt4
from ..expert_reading import Unreadable
from ..int4_reading import BACKEND, KeptInt4, group_of, int4_of, pair, word


@dataclass(frozen=True)
class Scheme:
    """What a scheme, or a method without schemes, says of its experts.

    Args:
        packing: how they lie.
        names: of weights, scales, zero points and orders of columns, behind "w13_" and "w2_".
        bits: of a weight; group: columns that share a scale, by the scheme and its experts.
        act_order: whether columns are sorted.
        zeros: whether the kernel is given zero points.
        wrong: what SGLang itself does wrongly with such experts, in words; "": nothing.
    """

    packing: Literal["marlin", "bytes"]
    names: tuple[str, str, str, str]
    bits: Callable[[Any], int]
    group: Callable[[Any, Any], int | None]
    act_order: Callable[[Any], bool]
    zeros: Callable[[Any], bool]
    wrong: Callable[[Any], str] = lambda _: ""


_GPTQ = ("qweight", "scales", "qzeros", "g_idx")
_PACKED = ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx")


def _order_of_awq(scheme: Any) -> str:
    if scheme.sym:
        return ""
    return (
        "SGLang brings the zero points of compressed-tensors in Marlin's order as if AWQ had packed them: "
        "most rows get another row's zero point"
    )


def _without_zeros(scheme: Any) -> str:
    return "" if scheme.sym else "SGLang's Triton experts leave out zero points"


_COMPRESSED = Scheme(
    "marlin",
    _PACKED,
    bits=lambda scheme: scheme.num_bits,
    group=lambda scheme, _: scheme.group_size,
    act_order=lambda scheme: scheme.actorder == "group",
    zeros=lambda scheme: not scheme.sym,
    wrong=_order_of_awq,
)
SCHEMES: Final = {
    # GPTQ, and AutoRound in its packing.
    "GPTQMarlinMoEScheme": Scheme(
        "marlin",
        _GPTQ,
        bits=lambda scheme: scheme.quant_config.weight_bits,
        group=lambda scheme, _: scheme.quant_config.group_size,
        act_order=lambda scheme: bool(scheme.quant_config.desc_act),
        zeros=lambda _: False,
    ),
    # AWQ, and AutoRound in its packing.
    "AWQMoEScheme": Scheme(
        "marlin",
        _GPTQ,
        bits=lambda scheme: scheme.quant_config.weight_bits,
        group=lambda scheme, _: scheme.quant_config.group_size,
        act_order=lambda _: False,
        zeros=lambda _: True,
    ),
    "CompressedTensorsWNA16MoE": _COMPRESSED,
    "CompressedTensorsWNA16TritonMoE": replace(
        _COMPRESSED, packing="bytes", zeros=lambda _: False, wrong=_without_zeros
    ),
    # Groups may be smaller here than the checkpoint's, whose scales are repeated then.
    "MoeWNA16Method": Scheme(
        "bytes",
        _GPTQ,
        bits=lambda method: method.quant_config.weight_bits,
        group=lambda _, experts: experts.group_size,
        act_order=lambda method: bool((method.quant_config.full_config or {}).get("desc_act")),
        zeros=lambda method: method.quant_config.has_zp,
    ),
}


def int4_backend(experts: Any) -> str:
    """Name who runs 4-bit experts: "int4 marlin"; "" for other experts."""
    row, _ = _scheme(experts)
    return "" if row is None else BACKEND.format(row.packing)


def int4_experts(experts: Any) -> ExpertWeights | None:
    """Describe the routed experts if they have 4 bits; None for others.

    Raises:
        Unreadable: as of `int4_of`.
    """
    row, scheme = _scheme(experts)
    if row is None:
        return None
    weight, scale, zero, order = row.names

    def both(name: str) -> Any:
        return pair(*(getattr(experts, f"{part}_{name}", None) for part in ("w13", "w2")))

    weights, scales = both(weight), both(scale)
    if weights is None or scales is None:
        raise Unreadable("4-bit experts have no weights under a name that is known")
    model = word(experts.moe_runner_config.params_dtype)
    built = BuiltInt4(
        packing=row.packing,
        activations=model,
        model=model,
        scales=word(scales[0].dtype),
        act_order=row.act_order(scheme) or (row.packing == "marlin" and both(order) is not None),
        width=int(experts.intermediate_size_per_partition),
        group=group_of(row.group(scheme, experts)),
        wrong=row.wrong(scheme),
    )
    zeros = both(zero) if row.zeros(scheme) else None
    if row.zeros(scheme) and zeros is None and not built.wrong:
        raise Unreadable("4-bit experts have no zero points under a name that is known")
    return int4_of(KeptInt4(built, int(experts.hidden_size), weights, scales, zeros))


def _scheme(experts: Any) -> tuple[Scheme | None, Any]:
    """Return the row of what keeps the experts, and that; None for a row where they do not have 4 bits."""
    method = experts.quant_method
    for owner in (getattr(experts, "scheme", None), method):
        row = SCHEMES.get(type(owner).__name__)
        if row is not None and row.bits(owner) == 4:
            return row, owner
    return None, method
