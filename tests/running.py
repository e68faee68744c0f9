"""What the tests of both engines run: cases, and the checkpoints that they need."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny_checkpoints

from fse_patch import verify
from fse_patch.fusion_core.decide import decide_roles

VOCAB = 256


@dataclass(frozen=True)
class Case:
    """One checkpoint in one engine configuration; ``order`` permutes its tensors over shards."""

    recipe: str
    dtype: str = "float32"
    engine_args: dict[str, Any] = field(default_factory=dict)
    order: str | None = None
    fault: str | None = None

    @property
    def name(self) -> str:
        return "-".join(filter(None, [self.recipe, self.dtype, self.order, self.fault]))


class Checkpoints:
    """Makes each checkpoint once a session."""

    def __init__(self, folder: Path, engine: str) -> None:
        self.folder = folder
        self.engine = engine

    def path(self, recipe: str, dtype: str = "float32", order: str | None = None) -> Path:
        plain = self.folder / dtype / recipe
        if not plain.exists():
            tiny_checkpoints.make(recipe, plain, dtype)
        if order is None:
            return plain
        permuted = self.folder / dtype / f"{recipe}-{order}"
        return permuted if permuted.exists() else tiny_checkpoints.permute(plain, permuted, order)

    def job(self, case: Case) -> verify.VerifyJob:
        """The case as `fse-patch verify` would run it."""
        folder = self.path(case.recipe, case.dtype, case.order)
        decisions = decide_roles(folder, self.engine)
        drafts = verify.SPECULATION[self.engine] in case.engine_args
        return verify.VerifyJob(
            folder,
            tuple(d for role, d in decisions.items() if d.fuse and (role == "main" or drafts)),
            VOCAB,
            case.dtype,
            case.engine_args if case.fault is None else {**case.engine_args, "fault": case.fault},
        )
