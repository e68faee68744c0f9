"""Deliberate faults where whole experts are spread over processes, switched inside a running engine.

Each is a change of the map of experts, or of the slots' weights, in every process. What the canary says of
the changed layers is told beside it: it looks at the same blocks again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# The shared part on every process, on none, and halved; and nothing changed.
FAULTS = ("both", "none", "halved", "")


def honest_map(experts: Any, held: torch.Tensor) -> torch.Tensor:
    """The map as it was built: kept on the experts when a fault is first asked for."""
    if not hasattr(experts, "_honest_map"):
        experts._honest_map = held.clone()
    kept: torch.Tensor = experts._honest_map
    return kept


def changed_map(fault: str, honest: torch.Tensor, routed: int, slots: int) -> torch.Tensor:
    """The map [E + ranks * S] with the slots on every process, or on none."""
    changed = honest.clone()
    if fault == "none":
        changed[routed:] = -1
    elif fault == "both":
        mine = honest[routed:][honest[routed:] >= 0]
        changed[routed:] = mine.repeat(len(changed[routed:]) // slots)
    return changed


def canary(role: Any, prover: Any) -> str:
    """What the canary says of a role's layers as they are now; nothing where it passes."""
    from fse_patch.adapters.prove import prove

    dtype = next(iter(role.layers.values())).block.gate.weight.dtype
    role.loaded = None
    try:
        prove(role, dtype, prover)
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def plant(fault: str, place: Callable[[Any], tuple[torch.Tensor, Callable[[torch.Tensor], None]]]) -> None:
    """Put a fault into every merged layer of this process; ``place`` gives its map, and takes another."""
    from fse_patch.adapters.role import constructed

    for role in constructed():
        layout = role.layout
        for layer in role.layers.values():
            held, put = place(layer.experts)
            honest = honest_map(layer.experts, held)
            put(changed_map(fault, honest, layout.num_routed, layout.num_shared_slots))
            halve(layer.router, fault == "halved")


def halve(router: Any, on: bool) -> None:
    """Let the slots of a router weigh half."""
    honest = type(router).append

    def append(states: Any, weights: Any, ids: Any) -> Any:
        weights, ids = honest(router, states, weights, ids)
        weights[:, router.layout.top_k :] *= 0.5
        return weights, ids

    if on:
        router.append = append
    else:
        vars(router).pop("append", None)
