"""The faults of faults.yaml: data alone. What plants each has its name in the other modules here.

A fault is caught when the process that would serve ends with an error before it could, or stays stock and
says why. An answer that merely differs is not caught.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

BOTH = ("vllm", "sglang")
CANARY = "canary: layer"
# What catches a fault, and how the outcome of the start then begins.
DEFENCES = {
    "guard": "RefusedError|FsePatchError",  # before the engine is patched
    "refusal": "stock",  # before the model is built: the decision
    "handshake": "FsePatchError|ValueError",  # while it is built: what is built against what was decided
    "audit": "AuditError|ValueError|RuntimeError",  # while it is loaded; or the engine's loader itself
    "samples": "AuditError",  # when it is loaded: parts of all slots against the stream
    "gate": "AuditError",  # after every load: the shared gates against the last stream
    "canary": "CanaryError|FsePatchError|RuntimeError",  # before it is served; or what ends its forward
    "engine": "IndexError|RuntimeError",  # the engine's loader
}
# What the error says, where the table does not.
WORDS = {
    "samples": "sampled values of .* are not the checkpoint's",
    "gate": "gate is not the one that was loaded",
    "canary": CANARY,
}


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        name: as in PLANTS, or in ALTER.
        what: what goes wrong, for people.
        defence: what catches it, see DEFENCES.
        words: what the error that ends the start, or the reason to stay stock, says: a regular expression.
        without: a defence that is switched off, to show that another one stands behind it.
        alone: what the error says without samples, where samples catch it; empty: nothing catches it then.
        recipe: the checkpoint, of ci/checkpoints.
        engines: where it is planted.
        sample: part of `make test`, not of `make test-all` and `make test-faults` alone.
        draft: the draft is built, not the main model.
        update: it shows when other weights are loaded into the running model.
        altered: it is in the checkpoint's files.
    """

    name: str
    what: str
    defence: str
    words: str = ""
    recipe: str = "qwen2_moe"
    engines: tuple[str, ...] = BOTH
    sample: bool = False
    draft: bool = False
    update: bool = False
    altered: bool = False
    without: str = ""
    alone: str = CANARY

    @property
    def id(self) -> str:
        return f"{self.name}-without_{self.without}" if self.without else self.name

    def __str__(self) -> str:
        return self.id

    @property
    def behind(self) -> Fault | None:
        """The same fault where samples are off, which the canary must catch."""
        if self.defence != "samples" or not self.alone:
            return None
        return replace(self, defence="canary", words=self.alone, without="samples", sample=False)

    def catches(self, outcome: str) -> bool:
        """Whether the start ended as it must."""
        return bool(
            re.match(DEFENCES[self.defence], outcome)
            and re.search(self.words or WORDS[self.defence], outcome)
        )


def load() -> dict[str, Fault]:
    """All of them, by id."""
    held = yaml.safe_load((Path(__file__).parent / "faults.yaml").read_text(encoding="utf-8"))
    rows = [Fault(defence=defence, **row) for defence, group in held.items() for row in group]
    rows += [behind for fault in rows if (behind := fault.behind)]
    assert len({fault.id for fault in rows}) == len(rows)
    return {fault.id: fault for fault in rows}


FAULTS = load()
