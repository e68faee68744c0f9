"""The start of one role: its decision, made once before allocation, and all that follows from it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

from .. import runtime
from ..errors import FsePatchError, RefusedError, words
from ..fusion_core.checkpoint.families import Role, family_of
from ..fusion_core.checkpoint.hub import locate
from ..fusion_core.checkpoint.naming import TensorNaming
from ..fusion_core.checkpoint.sources import Source
from ..fusion_core.checkpoint.weight_files import CheckpointFiles
from ..fusion_core.decision.decide import decide_evidence
from ..fusion_core.decision.outcome import Decision, Merged, MoeSpec, Paired, Stock, paired, remarked
from ..fusion_core.decision.policy_file import load_policy
from ..fusion_core.evidence.gather import read_evidence
from ..fusion_core.forward.plan import ModePlan
from ..fusion_core.forward.threshold import merged_gains
from ..fusion_core.reasons import CONTRADICTIONS, Code, Reason
from ..settings import Settings
from .patching import ledger, standing

# Codes of patches that some families do without.
CANNOT_BE_APPLIED: frozenset[Code] = frozenset({"fingerprint", "release.seam"})
log = logging.getLogger("fse_patch")


@dataclass(frozen=True)
class Settled:
    """What is settled about a role before anything is allocated, and is the same in all processes of a model.

    Args:
        files: those that the decision rests on; None where the checkpoint could not be read.
        plan: which mode runs for how many tokens, where layers of ours run.
        native_off: the engine's own fusion is switched off while the role is built and loaded.
        remark: behind the line for people.
    """

    decision: Decision
    files: CheckpointFiles | None = None
    plan: ModePlan | None = None
    native_off: bool = False
    remark: str = ""


@dataclass(frozen=True)
class Start:
    """All that is settled about a role before anything is allocated; everything later reads this object.

    Args:
        moe: its sparse layers.
        files: those that its weights come from.
        plan: which mode runs for how many tokens.
        expert_format: how the engine holds the experts, its own `ExpertFormat`; None where their layers run
            in one mode.
        native_off: the engine's own fusion is switched off while the role is built and loaded.
        settings: those of this process when the role was decided on.
        ranks: over how many processes whole experts are spread, each of which has slots of its own.
    """

    decision: Decision
    moe: MoeSpec
    naming: TensorNaming
    files: CheckpointFiles
    plan: ModePlan
    settings: Settings
    expert_format: Any = None
    native_off: bool = False
    ranks: int = 1

    @property
    def merged(self) -> bool:
        """Return whether the slots are built and loaded by us; otherwise the engine fuses by itself."""
        return isinstance(self.decision, Merged)


@dataclass(frozen=True)
class PairedStart:
    """All that is settled about a paired role before anything is allocated.

    Args:
        files: those that its weights come from; None where the checkpoint could not be read.
        native_off: as of `Start`.
    """

    decision: Paired
    settings: Settings
    naming: TensorNaming
    files: CheckpointFiles | None = None
    native_off: bool = False


@dataclass(frozen=True)
class Unfused:
    """A role that runs nothing of ours; ``native_off`` as of `Start`."""

    native_off: bool = False


def decision_of(
    engine: str, role: Role, locate: Callable[[], Source], load_format: str, settings: Settings
) -> Settled:
    """Decide by the checkpoint alone; one that cannot be read is refused.

    Args:
        locate: finds its files; an FsePatchError is a refusal.
        load_format: as the user gave it to the engine.
    """
    policy = load_policy(settings.policy_file)
    try:
        evidence = read_evidence(locate(), engine, load_format)
        return Settled(decide_evidence(evidence, engine, role, policy), evidence.files)
    except FsePatchError as error:
        why = str(error)
    except Exception as error:  # nothing has been built: a server starts, whatever is wrong with us
        log.debug("the %s model was not decided on", role, exc_info=True)
        why = f"{words(error)}; please report it"
    return Settled(Stock(role=role, engine=engine, reason=Reason("evidence.unreadable", why)))


def laid_out(settled: Settled, settings: Settings, refusals: Callable[[Paired], Iterator[Reason]]) -> Settled:
    """Return what was settled, under the layout that FSE_PATCH_LAYOUT asks for or lets be picked.

    Args:
        settled: as it is where weights are merged, or stay stock.
        refusals: what of the engine's configuration forbids to pair.
    """
    asked, decision = settings.layout, settled.decision
    if asked == "merged" or (asked == "auto" and isinstance(decision, Merged) and _gains(settled.plan)):
        return settled
    apart = paired(decision)
    if isinstance(apart, Paired) and (reason := _first(refusals, apart)) is not None:
        apart = apart.refused(reason)
    if asked == "auto" and not isinstance(apart, Paired):
        return settled
    return replace(settled, decision=apart, plan=None)


def _first(refusals: Callable[[Paired], Iterator[Reason]], apart: Paired) -> Reason | None:
    """Return the first refusal; where the configuration cannot be asked, that is one."""
    try:
        return next(refusals(apart), None)
    except Exception as error:  # nothing has been built: a server starts, whatever is wrong with us
        log.debug("the %s model is not paired", apart.role, exc_info=True)
        why = f"the configuration is not the known one: {words(error)}; please report it"
        return Reason("backend.layout", why)


def _gains(plan: ModePlan | None) -> bool:
    return plan is not None and merged_gains(plan)


def begin(
    settled: Settled, layers: int, settings: Settings, expert_format: Any = None, ranks: int = 1
) -> Start | PairedStart | Unfused:
    """Record what was settled, say it in a line, and return the start of the role in this process.

    Args:
        layers: number of the main model's layers.
        expert_format, ranks: as of `Start`.

    Raises:
        SystemExit: the arguments contradict fusing, and FSE_PATCH_STRICT is set: nothing has been read yet.
    """
    decision, plan, files = settled.decision, settled.plan, settled.files
    if isinstance(decision, Stock):
        _stop_if_asked_to(decision.engine, decision.reason, settings)
    patched = plan is not None or isinstance(decision, Paired)
    new = standing.remark_here(decision.engine) if patched else ""
    announce(decision, settled.remark + (f"; {new}" if new else ""))
    if isinstance(decision, Paired):
        naming = TensorNaming(decision.family, layers, decision.engine)
        return PairedStart(decision, settings, naming, files, settled.native_off)
    family, moe = family_of(decision.model_type), decision.moe
    if plan is None or files is None or family is None or moe is None:
        return Unfused(settled.native_off)
    naming = TensorNaming(family, layers, decision.engine)
    return Start(decision, moe, naming, files, plan, settings, expert_format, settled.native_off, ranks)


def _stop_if_asked_to(engine: str, reason: Reason, settings: Settings) -> None:
    if settings.strict and reason.code in CONTRADICTIONS | CANNOT_BE_APPLIED:
        print(f"fse_patch: {engine}: {reason.code}: {reason.detail}", file=sys.stderr, flush=True)
        raise SystemExit(RefusedError.exit_status)


def source_of(
    model: str,
    revision: str | None,
    download_dir: str | None,
    *,
    stored_at: str = "",
    token: object = None,
    suffices: Callable[[Source], bool] | None = None,
) -> Source:
    """Return where an engine loads a model from.

    Args:
        stored_at: the place of its weights where that is not the model's own, such as s3://...
        token: the engine's own for the hub, if it is one.
        suffices: of `locate`.

    Raises:
        FsePatchError: there is nothing, or nothing that can be read before it is loaded.
    """
    place = stored_at or model
    if "://" in place:
        raise FsePatchError(f"{place}: object storage, whose headers are not read before they are loaded")
    return locate(model, revision, download_dir, token if isinstance(token, str) else None, suffices)


def first_of_replica(settle: Callable[[], Settled], tensor_group: Any, pipeline_group: Any | None) -> Settled:
    """Let the first process of a model's replica settle, and give all others what it says.

    Every process of the replica calls this at the same point.

    Args:
        tensor_group, pipeline_group: the engine's own groups: of the processes that share each layer, and of
            those that share the layers out; the second is None where one stage alone has the role.
    """
    leads = tensor_group.rank_in_group == 0
    outcome: Settled | Exception | None = None
    if leads and (pipeline_group is None or pipeline_group.rank_in_group == 0):
        try:
            outcome = settle()
        except Exception as error:  # the others wait for an answer, whatever it is
            outcome = error
    if leads and pipeline_group is not None:
        outcome = pipeline_group.broadcast_object(outcome, src=0)
    outcome = tensor_group.broadcast_object(outcome, src=0)
    if isinstance(outcome, Settled):
        return outcome
    raise outcome or FsePatchError("the first process of this model has settled nothing")


def announce(decision: Decision, remark: str = "") -> None:
    """Record a decision, with ``remark`` behind it, and say in one line a role: on and where, or why not."""
    decision = remarked(decision, remark)
    runtime.record_decision(decision.to_dict())
    runtime.changed()
    head = f"{decision.engine}, {decision.role} model"
    if isinstance(decision, Merged):
        log.info("%s: shared expert fused: %s", head, decision.detail)
    elif isinstance(decision, Paired):
        log.debug("%s: to be paired: %s", head, decision.detail)  # the line is told when it is proved
    else:
        log.warning("%s: not fused: %s: %s", head, decision.reason.code, decision.reason.detail)


@cache
def _book(engine: str) -> ledger.Ledger:
    return ledger.load(engine)


def _name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _refused(engine: str, cls: type) -> RefusedError | None:
    """Return why models of an entry class stay as the engine builds them here; None where nothing says so."""
    return standing.refused_here(engine).get(_book(engine).families.get(_name(cls), ""))


def role_of(engine: str, cls: type) -> Role | None:
    """Return the role of an entry class; None for every other class, and where its patches are not in."""
    return None if _refused(engine, cls) else _book(engine).roles.get(_name(cls))


def announce_other(engine: str, cls: type, effective: Settings) -> None:
    """Say of a model that nothing decides for that it stays stock: silence never means on.

    Raises:
        SystemExit: its patches could not be put in, and FSE_PATCH_STRICT is set.
    """
    if role_of(engine, cls) is not None:
        return
    reason = Reason("family.unknown", f"{cls.__name__} is not a model class that fse_patch knows")
    if refused := _refused(engine, cls):
        reason = Reason(cast(Code, refused.reason), refused.detail)
    _stop_if_asked_to(engine, reason, effective)
    announce(Stock(role=_book(engine).roles.get(_name(cls), "main"), engine=engine, reason=reason))
