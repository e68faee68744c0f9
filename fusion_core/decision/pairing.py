"""Pairing by the checkpoint alone: which layers may run in one pass over weights that stay apart.

Nothing is merged, loaded or moved, so formats, widths and names do not matter here: what the engine made of
the weights is read and proved after it has loaded them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..checkpoint.config import MoeConfig
from ..evidence.gather import LayerEvidence, RoleEvidence
from ..evidence.specs import MlpSpec
from ..reasons import Reason
from .layout import ExpertLayout
from .policy import Policy, PolicyFacts

# Formats of experts that the pass reads where an engine left them, routed and shared ones in any combination.
READS = (
    "bfloat16",
    "float16",
    "FP8 (block, channel, tensor)",
    "4-bit integers of routed experts (GPTQ, AWQ, AutoRound, compressed-tensors)",
)
# The same by dtypes of headers, and for routed experts by names of formats.
READ_DTYPES = frozenset({"BF16", "F16", "F32", "F8_E4M3"})
READ_ROUTED = ("fp8-", "int4-")


def pairing_words(layers: Iterable[LayerEvidence]) -> str:
    """Say how experts are stored: "routed int4-gptq, shared BF16"; "" where no headers show it."""
    found = set()
    for layer in layers:
        if layer.routed is None or layer.shared is None:
            continue
        named = layer.config.format if layer.config else ""
        routed = named if named not in ("", "plain") else _dtypes(layer.routed)
        found.add(f"routed {routed}, shared {_dtypes(layer.shared)}")
    return "; ".join(sorted(found))


def pairing_unread(layers: Iterable[LayerEvidence]) -> str:
    """Say of which experts headers show that the pass does not read them: "routed nvfp4"; "" for none.

    What an engine makes of the others is seen when they are loaded.
    """
    for layer in layers:
        if layer.routed is None or layer.shared is None:
            continue
        if layer.shared.packed or not _read(layer.shared):
            return f"shared {_dtypes(layer.shared)}"
        named = layer.config.format if layer.config else ""
        if named not in ("", "plain") and not named.startswith(READ_ROUTED):
            return f"routed {named}"
        # Packed in a way that the config does not tell, they may be those of 4 bits.
        if named in ("", "plain") and not layer.routed.packed and not _read(layer.routed):
            return f"routed {_dtypes(layer.routed)}"
    return ""


def _read(spec: MlpSpec) -> bool:
    return {tensor.dtype for tensor in spec.tensors if tensor.suffix == "weight"} <= READ_DTYPES


def _dtypes(spec: MlpSpec) -> str:
    if spec.packed:
        return "packed " + "/".join(sorted({tensor.suffix for tensor in spec.tensors}))
    return "/".join(sorted({tensor.dtype for tensor in spec.tensors if tensor.suffix == "weight"}))


def pairing_layout(
    moe: MoeConfig,
    role: RoleEvidence,
    policy: Policy,
    facts_of: Callable[[LayerEvidence | None], PolicyFacts],
) -> ExpertLayout | Reason:
    """Return the layout of the layers of a role that may be paired, or why they may not.

    Its ``num_shared_slots`` is the number of routed widths that cover the shared expert. Activation and
    layers of the model are the caller's to check.

    Args:
        facts_of: what rules look at in a layer; of all layers for None.
    """
    for layer in role.layers or (None,):
        rule = policy.rule_for(facts_of(layer))
        if not rule.pairs:
            where = f"layer {layer.layer}" if layer else "config.json"
            return Reason("disabled" if rule.fuse else rule.reason, f"{where}: {rule.why} ({rule.id})")
    return ExpertLayout(
        num_routed=moe.num_routed,
        num_shared_slots=-(-moe.shared_intermediate_size // moe.moe_intermediate_size),
        top_k=moe.top_k,
        hidden_size=moe.hidden_size,
        moe_intermediate_size=moe.moe_intermediate_size,
    )
