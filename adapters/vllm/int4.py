"""4-bit routed experts of vLLM: where each of its quant methods keeps what it made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from ...fusion_core.kernels.expert_weights import ExpertWeights
from ...fusion_core.quant.built_int4 import SIXTEEN_BITS, BuiltInt4
from ..expert_reading import Unreadable
from ..int4_reading import BACKEND, KeptInt4, group_of, int4_of, pair, word

# Who runs the experts -> how they lie.
PACKINGS: Final = {
    "MarlinExperts": "marlin",
    "HummingIndexedExperts": "humming",
    "HummingGroupedExperts": "humming",
    "TritonWNA16Experts": "bytes",
}


@dataclass(frozen=True)
class Method:
    """What a quant method says of its experts.

    Args:
        bits: of a weight; group: columns that share a scale; both of the method and its experts.
        act_order: whether columns are sorted.
        runs: who runs the experts where the method does not say it.
    """

    bits: Callable[[Any], int]
    group: Callable[[Any, Any], int | None]
    act_order: Callable[[Any], bool]
    runs: str = ""


def _declares_order(method: Any) -> bool:
    return bool((getattr(method.quant_config, "full_config", None) or {}).get("desc_act"))


_PACKED = Method(
    bits=lambda method: method.num_bits,
    group=lambda method, _: method.group_size,
    act_order=lambda method: method.weight_quant.actorder == "group",
)
METHODS: Final = {
    # GPTQ, and AutoRound in its packing.
    "AutoGPTQMoEMethod": Method(
        bits=lambda method: method.quant_config.weight_bits,
        group=lambda method, _: method.quant_config.group_size,
        act_order=lambda method: bool(method.quant_config.desc_act),
    ),
    # AWQ, and AutoRound in its packing.
    "AutoAWQMoEMethod": Method(
        bits=lambda method: method.quant_config.weight_bits,
        group=lambda method, _: method.quant_config.group_size,
        act_order=lambda _: False,
    ),
    "CompressedTensorsWNA16MoEMethod": _PACKED,
    "CompressedTensorsWNA16MarlinMoEMethod": _PACKED,  # releases before 0.28
    # Groups may be smaller here than the checkpoint's, whose scales are repeated then.
    "MoeWNA16Method": Method(
        bits=lambda method: method.quant_config.weight_bits,
        group=lambda _, experts: experts.group_size,
        act_order=_declares_order,
        runs="TritonWNA16Experts",
    ),
}


def int4_backend(experts: Any) -> str:
    """Name who runs 4-bit experts: "int4 marlin", or by the class that is not known; "" for other experts."""
    return "" if _method(experts) is None else BACKEND.format(_packing(experts))


def int4_experts(experts: Any) -> ExpertWeights | None:
    """Describe the routed experts if they have 4 bits; None for others.

    Raises:
        Unreadable: as of `int4_of`.
    """
    row, method = _method(experts), experts.quant_method
    if row is None:
        return None
    config = method.moe_quant_config or method.get_fused_moe_quant_config(experts)
    weights = pair(*(_weight(experts, name) for name in ("w13", "w2")))
    scales = pair(config.w1_scale, config.w2_scale)
    if weights is None or scales is None:
        raise Unreadable("4-bit experts have no weights under a name that is known")
    packing, group = _packing(experts), group_of(row.group(method, experts))
    if packing not in PACKINGS.values():
        raise Unreadable(f"the engine runs 4-bit experts by {packing}")
    model = word(experts.moe_config.in_dtype)
    activations, wrong = model, ""
    if packing == "humming":
        activations, group = _humming(experts)
    elif packing == "marlin":
        activations, wrong = _marlin_input(method, model)
    built = BuiltInt4(
        packing=packing,
        activations=activations,
        model=model,
        scales=word(scales[0].dtype),
        act_order=row.act_order(method) or (packing == "marlin" and pair(*_orders(experts)) is not None),
        width=int(experts.intermediate_size_per_partition),
        group=group,
        biases=pair(config.w1_bias, config.w2_bias) is not None,
        wrong=wrong,
    )
    return int4_of(
        KeptInt4(built, int(experts.hidden_size), weights, scales, pair(config.w1_zp, config.w2_zp))
    )


def _method(experts: Any) -> Method | None:
    row = METHODS.get(type(experts.quant_method).__name__)
    return row if row is not None and row.bits(experts.quant_method) == 4 else None


def _packing(experts: Any) -> Any:
    """Return how weights lie, or the class that runs them where that is not known."""
    method = experts.quant_method
    runs = getattr(method, "experts_cls", None)
    name = runs.__name__ if runs is not None else METHODS[type(method).__name__].runs
    return PACKINGS.get(name, name or "a kernel that is not known")


def _weight(experts: Any, name: str) -> Any:
    held = getattr(experts, f"{name}_weight", None)
    return getattr(experts, f"{name}_qweight", None) if held is None else held


def _orders(experts: Any) -> tuple[Any, Any]:
    """Return the orders of columns of both matrices, which only older releases have."""
    names = ("g_idx", "weight_g_idx")
    found = ([getattr(experts, f"{part}_{name}", None) for name in names] for part in ("w13", "w2"))
    first, second = (next((held for held in some if held is not None), None) for some in found)
    return first, second


def _marlin_input(method: Any, model: str) -> tuple[str, str]:
    """Return the dtype that Marlin multiplies in, and what is wrong with it, in words."""
    runs = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
    packed, run = (
        model if (dtype := getattr(owner, "input_dtype", None)) is None else word(dtype)
        for owner in (method, runs)
    )
    wrong = ""
    if packed != run and (packed not in SIXTEEN_BITS or run not in SIXTEEN_BITS):
        # AutoRound's experts are packed without a look at the setting.
        wrong = f"vLLM packs these experts for states in {packed}, and multiplies in {run}"
    return (run if packed == model else packed), wrong


def _humming(experts: Any) -> tuple[str, int]:
    """Return the dtype that Humming multiplies in, and the columns of a group.

    Raises:
        Unreadable: it keeps weights otherwise than as plain numbers of 4 bits with one scale each.
    """
    configs = getattr(experts, "humming_configs", None)
    if configs is None:
        raise Unreadable("this release's Humming does not say how it keeps weights", "quant.layout")
    both = [configs[name] for name in ("w13", "w2")]
    first, second = ((str(one.a_dtype), int(one.weight_scale_group_size)) for one in both)
    otherwise = {
        f"weights as {both[0].b_dtype} and {both[1].b_dtype}": {str(one.b_dtype) for one in both}
        != {"uint4"},
        f"w13 and w2 apart: {first} and {second}": first != second,
        "zero points that are no integers": any(one.is_fp_zero_point for one in both),
        "scales of scales": getattr(experts, "w13_weight_scale_2", None) is not None,
        "weights rotated": any((one.hadamard_block_size or 0) > 1 for one in experts.weight_schemas.values()),
    }
    for what, so in otherwise.items():
        if so:
            raise Unreadable(f"Humming keeps {what}", "quant.layout")
    return first
