"""AMD's AITER: which of its operations are there, and calls that are right on every release of it.

Signatures and behaviour are those of its sources, https://github.com/ROCm/aiter, from v0.1.4 on;
tests/fakes/aiter_signatures.json has them by tag. AITER is no dependency: it is imported when first asked
for, on ROCm alone, and whatever is wrong with it is a reason not to use it. It aborts the process on what it
does not take, or reads it as something else, so everything is checked here, before the call.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..decision.outcome import RoutingSpec

# CDNA3 and CDNA4. Elsewhere only its Triton parts exist.
ARCHITECTURES = ("gfx942", "gfx950")
# Where each operation is, and what its module has to have besides.
SYMBOLS = {
    "topk_softmax": "aiter",
    "biased_grouped_topk": "aiter",
    "ActivationType": "aiter",
    "QuantType": "aiter",
    "fused_moe": "aiter.fused_moe",
    "shuffle_weight": "aiter.ops.shuffle",
}
SHARED_ARGUMENT = "num_shared_experts"
LOGITS = (torch.float32, torch.float16, torch.bfloat16)
# csrc/kernels/topk_softmax_kernels.cu: widths that the fast path is instantiated for, and shared experts.
FAST_EXPERTS = frozenset(2**n for n in range(10))
SHARED_COUNTS = frozenset({1, 2, 4, 8})
# csrc/kernels/topk_softmax_kernels_group.cu
GROUP_COUNTS = frozenset({1, 2, 4, 8})
WAVEFRONT = 64
# Experts of a group up to which large batches take moe_fused_gate, which leaves the scale out.
GATE_GROUP = 32
# What both weights have to be a multiple of, rows and columns, to be shuffled as (16, 16).
SHUFFLE_ROWS, SHUFFLE_COLUMNS = 16, 32
TopK = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class AiterCaps:
    """Operations that can be called; one that is not to be used is None.

    Args:
        why: why nothing can be, or "".
        topk_takes_shared: `topk_softmax` has the 7-argument form.
        moe_arguments: parameters of `fused_moe`.
    """

    why: str = ""
    topk_softmax: Callable[..., None] | None = None
    biased_grouped_topk: Callable[..., None] | None = None
    fused_moe: Callable[..., torch.Tensor] | None = None
    shuffle_weight: Callable[..., torch.Tensor] | None = None
    topk_takes_shared: bool = False
    moe_arguments: frozenset[str] = frozenset()
    silu: Any = None
    unquantised: Any = None


def architecture() -> str:
    """Return the name of the current GPU's architecture, such as gfx942."""
    return str(torch.cuda.get_device_properties().gcnArchName).partition(":")[0]


def probe() -> AiterCaps:
    """Look for AITER. Costs its import; never raises."""
    if torch.version.hip is None:
        return AiterCaps("torch is not built for ROCm")
    symbols: dict[str, Any] = {}
    try:
        if (arch := architecture()) not in ARCHITECTURES:
            return AiterCaps(f"the GPU is {arch}; AITER's kernels are for {' and '.join(ARCHITECTURES)}")
        for name, module in SYMBOLS.items():
            symbols[name] = getattr(importlib.import_module(module), name, None)
        if missing := [name for name, symbol in symbols.items() if symbol is None]:
            # One release imports without its kernels; and the package of that name on PyPI is another one.
            return AiterCaps(f"aiter has no {', '.join(missing)}")
        return AiterCaps(
            topk_softmax=symbols["topk_softmax"],
            biased_grouped_topk=symbols["biased_grouped_topk"],
            fused_moe=symbols["fused_moe"],
            shuffle_weight=symbols["shuffle_weight"],
            topk_takes_shared=_takes_shared(symbols["topk_softmax"]),
            moe_arguments=frozenset(inspect.signature(symbols["fused_moe"]).parameters),
            silu=symbols["ActivationType"].Silu,
            unquantised=symbols["QuantType"].No,
        )
    except Exception as error:  # whatever an import of a half-installed package raises
        return AiterCaps(f"aiter cannot be used: {type(error).__name__}: {error}")


def _takes_shared(topk_softmax: Callable[..., None]) -> bool:
    """Look for the 7-argument form: by signature, or by schema where a wrapper hides that."""
    try:
        parameters = inspect.signature(topk_softmax).parameters
    except (TypeError, ValueError):
        parameters = inspect.signature(lambda *_: None).parameters
    if not any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        return SHARED_ARGUMENT in parameters
    packet = getattr(torch.ops.aiter, "topk_softmax", None)
    schema = getattr(getattr(packet, "default", None), "_schema", None)
    return schema is not None and any(argument.name == SHARED_ARGUMENT for argument in schema.arguments)


def softmax_topk(caps: AiterCaps, logits: torch.Tensor, top_k: int, renormalize: bool) -> TopK:
    """Choose the ``top_k`` routed experts by AITER's 5-argument `topk_softmax`, right on every release.

    p = softmax(logits) over all E, its k largest, divided by their sum if ``renormalize``; in float32.

    Args:
        logits: [num_tokens, E] float32, float16 or bfloat16. May be strided: they are copied then, because
            releases before v0.1.11, and before v0.1.19.post2 where E is no power of two, ignore strides.

    Returns:
        ``topk_weights`` float32 and ``topk_ids`` int32, both [num_tokens, top_k] and contiguous: ids of
        another dtype are overwritten as int32 without a word.
    """
    assert caps.topk_softmax is not None
    logits = (logits if logits.dtype in LOGITS else logits.float()).contiguous()
    weights = logits.new_empty(logits.shape[0], top_k, dtype=torch.float32)
    ids, source_rows = (torch.empty_like(weights, dtype=torch.int32) for _ in range(2))
    # By position: v0.1.5 calls its parameters arg0 to arg4.
    caps.topk_softmax(weights, ids, source_rows, logits, renormalize)
    return weights, ids


def shared_refusal(caps: AiterCaps, num_routed: int, num_shared: int, padding: bool) -> str:
    """Say why the 7-argument `topk_softmax` cannot serve a layer, or "" where it can.

    Args:
        padding: rows may have to be left out of the shared experts.
    """
    if not caps.topk_takes_shared:
        return "this AITER's topk_softmax takes no shared experts"
    if num_routed not in FAST_EXPERTS:
        return f"{num_routed} experts take AITER's slow path, which ignores strides up to v0.1.19.post1"
    if num_shared not in SHARED_COUNTS:
        return f"AITER's topk_softmax has no form for {num_shared} shared experts"
    return "it gives padded rows to the shared experts" if padding else ""


def softmax_topk_shared(
    caps: AiterCaps, logits: torch.Tensor, top_k: int, slots: range, renormalize: bool
) -> TopK:
    """Choose experts and append slots by the 7-argument `topk_softmax`; only where `shared_refusal` is "".

    The kernel writes sigmoid(logit), in float32, to the slots' weights, and leaves their ids alone.

    Args:
        logits: [num_tokens, E + S], any float dtype; the last S columns are the shared gate's logit, S times.
            Rows may be strided.
        slots: the S ids, from E on.

    Returns:
        ``topk_weights`` float32 and ``topk_ids`` int32, [num_tokens, top_k + S].
    """
    assert caps.topk_softmax is not None
    if logits.dtype not in LOGITS or logits.stride(-1) != 1:
        logits = logits.float().contiguous()
    weights = logits.new_empty(logits.shape[0], top_k + len(slots), dtype=torch.float32)
    ids = torch.empty_like(weights, dtype=torch.int32)
    ids[:, top_k:] = torch.arange(slots.start, slots.stop, dtype=torch.int32, device=ids.device)
    source_rows = torch.empty(logits.shape[0], top_k, dtype=torch.int32, device=ids.device)
    # It reads k off the ids that it is given, and finds the slots' weights behind the k of the whole rows.
    caps.topk_softmax(weights, ids[:, :top_k], source_rows, logits, renormalize, len(slots), "sigmoid")
    return weights, ids


def grouped_refusal(caps: AiterCaps, spec: RoutingSpec, num_routed: int, top_k: int) -> str:
    """Say why `biased_grouped_topk` cannot route a layer, or ""."""
    groups = spec.num_expert_group
    if caps.biased_grouped_topk is None:
        return caps.why or "it is not to be used"
    if spec.scoring != "sigmoid" or not spec.has_correction_bias or not spec.renormalize:
        return "only renormalised sigmoid scores with a correction bias are known to be right"
    if groups not in GROUP_COUNTS or num_routed % groups or top_k > WAVEFRONT:
        return f"it takes 1, 2, 4 or 8 groups and a top-k up to {WAVEFRONT}"
    if num_routed // groups <= GATE_GROUP and spec.routed_scaling_factor != 1.0:
        return f"groups of {num_routed // groups} experts lose routed_scaling_factor in large batches"
    return ""


def grouped_topk(
    caps: AiterCaps, logits: torch.Tensor, correction_bias: torch.Tensor, top_k: int, spec: RoutingSpec
) -> TopK:
    """Route as GLM does, by `biased_grouped_topk`; only where `grouped_refusal` is "".

    ``routed_scaling_factor`` is inside the weights then, and nowhere else may it be applied again.

    Args:
        logits: [num_tokens, E], any float dtype; taken in float32, since the kernel reads the bias in the
            logits' dtype.
        correction_bias: [E], any float dtype.

    Returns:
        ``topk_weights`` float32 and ``topk_ids`` int32, both [num_tokens, top_k]: one row stride serves both
        in the kernel.
    """
    assert caps.biased_grouped_topk is not None
    logits = logits.float().contiguous()
    weights = logits.new_empty(logits.shape[0], top_k)
    ids = torch.empty_like(weights, dtype=torch.int32)
    caps.biased_grouped_topk(
        logits, correction_bias.float().contiguous(), weights, ids,
        spec.num_expert_group, spec.topk_group, spec.renormalize, spec.routed_scaling_factor,
    )  # fmt: skip
    return weights, ids


def without_padding(weights: torch.Tensor, ids: torch.Tensor, top_k: int) -> TopK:
    """Turn padded rows into rows of expert 0 that weigh nothing, their slots included.

    AITER's kernels use an id as an address; and what a padded row adds must be 0 on every rank. Engines mark
    such rows by negative ids, or by routed weights that are all 0.

    Args:
        weights, ids: [num_tokens, top_k + S], float32 and int32.

    Returns:
        Both, of the same shapes and dtypes.
    """
    padded = (ids[:, :top_k] < 0).any(-1, keepdim=True) | (weights[:, :top_k] == 0).all(-1, keepdim=True)
    return weights.masked_fill(padded, 0.0), ids.masked_fill(padded, 0)
