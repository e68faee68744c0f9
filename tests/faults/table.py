"""The faults that are planted: data alone. What plants each is found under its name in the other modules here.

A fault is caught when the process that would serve stops with an error before it could, or stays stock and says
why. An answer that merely differs is not caught.
"""

from __future__ import annotations

from dataclasses import dataclass

BOTH = ("vllm", "sglang")


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        name: as in PLANTS.
        what: what goes wrong, for people.
        words: a part of the error that must end the start, or of the reason to stay stock.
        defence: what catches it; the error's class follows from it.
        recipe: the checkpoint, of ci/checkpoints.
        engines: where it is planted.
        sample: part of `make test`, not of `make test-faults` alone.
    """

    name: str
    what: str
    words: str
    defence: str
    recipe: str = "qwen2_moe"
    engines: tuple[str, ...] = BOTH
    sample: bool = False
