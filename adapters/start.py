"""The start of one role: its decision, made once before allocation, and all that follows from it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .. import runtime
from ..errors import FsePatchError, RefusedError
from ..fusion_core.checkpoint.families import Role
from ..fusion_core.checkpoint.naming import TensorNaming
from ..fusion_core.decision.decide import decide
from ..fusion_core.decision.outcome import Decision, Merged, MoeSpec, Stock, remarked
from ..fusion_core.decision.policy_file import load_policy
from ..fusion_core.forward.plan import ModePlan
from ..fusion_core.reasons import CONTRADICTIONS, Reason
from ..settings import Settings
from .patching import ledger

log = logging.getLogger("fse_patch")


@dataclass(frozen=True)
class Start:
    """All that is settled about a role before anything is allocated; everything later reads this object.

    Args:
        moe: its sparse layers.
        checkpoint: the folder that its weights come from.
        plan: which mode runs for how many tokens.
        expert_format: how the engine holds the experts, its own `ExpertFormat`; None where their layers run
            in one mode.
        native_off: the engine's own fusion is switched off while the role is built and loaded.
        settings: those of this process when the role was decided on.
    """

    decision: Decision
    moe: MoeSpec
    naming: TensorNaming
    checkpoint: Path
    plan: ModePlan
    settings: Settings
    expert_format: Any = None
    native_off: bool = False

    @property
    def merged(self) -> bool:
        """Return whether the slots are built and loaded by us; otherwise the engine fuses by itself."""
        return isinstance(self.decision, Merged)


@dataclass(frozen=True)
class Unfused:
    """A role that runs nothing of ours; ``native_off`` as of `Start`."""

    native_off: bool = False


def decision_of(engine: str, role: Role, locate: Callable[[], Path], settings: Settings) -> Decision:
    """Decide by the checkpoint alone; one that cannot be read is refused.

    Args:
        locate: the checkpoint's folder; an FsePatchError is a refusal.
    """
    policy = load_policy(settings.policy_file)
    try:
        return decide(locate(), engine, role, policy)
    except FsePatchError as error:
        return Stock(role=role, engine=engine, reason=Reason("evidence.unreadable", str(error)))


def refuse(decision: Merged, reason: Reason, settings: Settings) -> Stock:
    """Refuse what the checkpoint allows, because of the engine's own configuration.

    Raises:
        SystemExit: the arguments contradict fusing, and FSE_PATCH_STRICT is set: nothing has been read yet.
    """
    if reason.code in CONTRADICTIONS and settings.strict_arguments:
        print(f"fse_patch: {decision.engine}: {reason.code}: {reason.detail}", file=sys.stderr, flush=True)
        raise SystemExit(RefusedError.exit_status)
    return decision.refused(reason)


def checkpoint_folder(model: str, revision: str | None, cache: str | None) -> Path:
    """Return the folder that an engine loads from; a hub name is looked up in the local cache alone.

    Raises:
        FsePatchError: there is none.
    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, cache_dir=cache, local_files_only=True))
    except Exception as error:
        raise FsePatchError(
            f"{model}: not a folder and not in the local hub cache; download it first"
        ) from error


def announce(decision: Decision, remark: str = "") -> None:
    """Record a decision, with ``remark`` behind it, and say in one line a role: on and where, or why not."""
    decision = remarked(decision, remark)
    runtime.record_decision(decision.to_dict())
    runtime.changed()
    head = f"{decision.engine}, {decision.role} model"
    if isinstance(decision, Merged):
        log.info("%s: shared expert fused: %s", head, decision.detail)
    else:
        log.warning("%s: not fused: %s: %s", head, decision.reason.code, decision.reason.detail)


@cache
def _entry_roles(engine: str) -> dict[str, Role]:
    """Return the role of each entry class of an engine, by ``module:class``."""
    return dict(ledger.load(engine).roles)


def role_of(engine: str, cls: type) -> Role | None:
    """Return the role of an entry class; None for every other class."""
    return _entry_roles(engine).get(f"{cls.__module__}:{cls.__qualname__}")


def announce_other(engine: str, cls: type) -> None:
    """Say of a model that is not an entry class that it stays stock: silence never means on."""
    if role_of(engine, cls) is None:
        detail = f"{cls.__name__} is not a model class that fse_patch knows"
        announce(Stock(role="main", engine=engine, reason=Reason("family.unknown", detail)))
