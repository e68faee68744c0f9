"""What `fse-patch verify` does inside the process that holds the model, whichever engine runs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch

from .. import runtime
from ..adapters import head as heads
from ..adapters import paired
from ..adapters.paired import PairedRole
from ..adapters.role import FusedRole, constructed
from ..errors import FsePatchError
from . import slot_control

# Of heads that were switched off for a while: up to how many tokens they ran.
_LIMITS: WeakKeyDictionary[heads.Head, int] = WeakKeyDictionary()
# Those whose scales are doubled.
_DOUBLED: WeakSet[heads.Head] = WeakSet()


def _roles() -> list[FusedRole | PairedRole]:
    return [*constructed(), *paired.constructed()]


def report(stage: int = 0) -> dict[str, Any]:
    """Return the process, what each role really ran in it, and which kernels were replaced by stand-ins.

    A stand-in for a kernel package says of itself, in REPLACED, which of its operations ran.

    Args:
        stage: pipeline stage of the process.
    """
    stand_in = sys.modules.get("sgl_kernel")
    roles = [role.report() for role in _roles()]
    ours = {role["role"] for role in roles}
    return {
        "pid": os.getpid(),
        "stage": stage,
        "roles": roles,
        "lm_heads": [own.report() for own in heads.constructed()],
        "refused": [d for d in runtime.decisions() if not d["fuse"] and d["role"] not in ours],
        "replaced_operations": sorted(vars(stand_in).get("REPLACED", ())) if stand_in else [],
    }


def reset() -> None:
    """Forget the calls of the engine's own warm-up; graphs that it captured run later."""
    for role in _roles():
        role.counter.reset()
    for own in heads.constructed():
        own.calls.clear()


def control(factor: float) -> None:
    """Multiply the first shared slot of every layer of the main model by ``factor``; 1.0 puts it back."""
    for role in _roles():
        if role.name == "main":
            slot_control.multiply(role, factor)


def head(state: str) -> None:
    """Let the LM head run as the engine has it ("off"), in 8 bits ("on"), or with scales doubled ("control").

    Raises:
        FsePatchError: captured graphs run it in 8 bits, whatever is said here.
    """
    for own in heads.constructed():
        _LIMITS.setdefault(own, own.limit)
        if own.captured[heads.FORMAT]:
            raise FsePatchError("captured CUDA graphs run the LM head in 8 bits; verify it without graphs")
        own.limit = 0 if state == "off" else _LIMITS[own]
        # The copy that serves is what is verified: nothing of it is made anew, and a factor of 2 is exact.
        if (state == "control") != (own in _DOUBLED):
            own.held.scales.mul_(2.0 if state == "control" else 0.5)
            (_DOUBLED.add if state == "control" else _DOUBLED.discard)(own)


def jitter(modules: Iterable[Any], seed: int) -> None:
    """Give the 16-bit embedding among ``modules`` the noise of one more rounding.

    Rounding is uniform within half a unit in the last place, variance 1/12; so each weight moves
    to a neighbouring value with probability 1/12. How far a model carries that is the yardstick
    where the kernels give the same bits for every batch composition, as they do on CPU.

    Raises:
        FsePatchError: the control is in force: the yardstick would measure that, and allow as much.
    """
    if any(map(slot_control.in_force, _roles())):
        raise FsePatchError("the control must be undone before the noise of one more rounding is measured")
    for module in modules:
        if type(module).__name__ == "VocabParallelEmbedding":
            weight = module.weight.data
            draw = torch.Generator().manual_seed(seed)
            moved = torch.rand(weight.shape, generator=draw) < 1 / 12
            step = torch.randint(0, 2, weight.shape, generator=draw) * 2 - 1
            # Adding 1 to the bits of a float gives its neighbour; zero has none below.
            step = (step * moved * (weight != 0).cpu()).to(weight.device, torch.int16)
            weight.view(torch.int16).add_(step)
