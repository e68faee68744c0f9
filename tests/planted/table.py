"""The faults of faults.yaml: data alone. What plants each is found under its name in the other modules here.

A fault is caught when the process that would serve ends with an error before it could, or stays stock and says
why. An answer that merely differs is not caught.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

BOTH = ("vllm", "sglang")
# What catches a fault, and how the outcome of the start then begins.
DEFENCES = {
    "guard": "RefusedError|FsePatchError",  # before the engine is patched
    "refusal": "stock",  # before the model is built: the decision
    "handshake": "FsePatchError|ValueError",  # while it is built: what is built against what was decided
    "audit": "AuditError|ValueError|RuntimeError",  # while it is loaded; or the engine's loader itself
    "samples": "AuditError",  # when it is loaded: parts of all slots against the files
    "gate": "AuditError",  # after every load: the shared gates against the last stream
    "canary": "CanaryError|FsePatchError|RuntimeError",  # before it is served; or what ends its forward
    "engine": "IndexError|RuntimeError",  # the engine's loader
}


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        name: as in PLANTS, or in ALTER.
        what: what goes wrong, for people.
        defence: what catches it, see DEFENCES.
        words: what the error that ends the start, or the reason to stay stock, says: a regular expression.
        recipe: the checkpoint, of ci/checkpoints.
        engines: where it is planted.
        sample: part of `make test`, not of `make test-faults` alone.
        draft: the draft is built, not the main model.
        update: it shows when other weights are loaded into the running model.
        altered: it is in the checkpoint's files.
    """

    name: str
    what: str
    defence: str
    words: str = "canary: layer"
    recipe: str = "qwen2_moe"
    engines: tuple[str, ...] = BOTH
    sample: bool = False
    draft: bool = False
    update: bool = False
    altered: bool = False

    def catches(self, outcome: str) -> bool:
        """Whether the start ended as it must."""
        return bool(re.match(DEFENCES[self.defence], outcome) and re.search(self.words, outcome))


def load() -> dict[str, Fault]:
    """All of them, by name."""
    held = yaml.safe_load((Path(__file__).parent / "faults.yaml").read_text(encoding="utf-8"))
    rows = [Fault(defence=defence, **row) for defence, group in held.items() for row in group]
    assert len({fault.name for fault in rows}) == len(rows)
    return {fault.name: fault for fault in rows}


FAULTS = load()
