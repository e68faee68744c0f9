"""LoRA: adapters on attention alone run beside layers of ours; what would change their experts is refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from ..errors import FsePatchError
from ..fusion_core.reasons import Reason

# Modules of a sparse block, and words that stand for every module.
BLOCK = frozenset({"mlp", "experts", "shared_expert", "shared_experts", "shared_expert_gate", "gate"})
PROJECTIONS = frozenset({"gate_up_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "w13"})
EVERY = frozenset({"all", "all-linear"})
IN_BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)\.mlp(?:\.|$)")


def refused_targets(targets: Iterable[str] | None, flag: str) -> Iterator[Reason]:
    """Refuse modules that adapters may change, where a layer of ours reads one of them.

    Args:
        targets: names of modules, or ends of them, as the user limits adapters to; None: every module.
        flag: the argument that limits them.
    """
    advice = f"give {flag} with modules of the attention alone"
    if not targets:
        yield Reason("lora", f"LoRA adapters may change experts; {advice}")
    elif named := sorted(name for name in targets if touches_block(name)):
        yield Reason("lora", f"LoRA adapters may change {named[0]}; {advice}")


def touches_block(name: str) -> bool:
    """Return whether a name of a module, or its end, can stand for a part of a sparse block."""
    parts = name.split(".")
    return parts[-1] in PROJECTIONS | EVERY or not BLOCK.isdisjoint(parts)


def check_adapter(adapter: str, names: Iterable[str]) -> None:
    """Stop an adapter that changes a part of a layer of ours: its answers would be wrong without a word.

    Args:
        adapter: its name, for the error.
        names: of its modules or tensors.

    Raises:
        FsePatchError: it changes experts, or a gate.
    """
    from .paired import constructed as paired_roles  # these need torch
    from .role import constructed as merged_roles

    merged = {n for role in merged_roles() if role.layers for n in role.start.moe.layers}
    paired = {n for role in paired_roles() for n in role.start.decision.moe.layers}
    for name in names:
        match = IN_BLOCK.search(name)
        if match and int(match[1]) in merged | paired:
            raise FsePatchError(
                f"LoRA adapter {adapter!r} changes {name}, and fse_patch runs the shared expert with the "
                "routed ones; give an adapter of the attention alone, or start again with FSE_PATCH=0"
            )
