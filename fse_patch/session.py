"""apply, remove and status: the ledger, its guards and its patches put together. Loaded at the first call."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from . import child_environment, metrics, runtime, settings, status_endpoint
from .adapters.patching import guards, ledger, standing
from .adapters.patching.spec import PatchSpec
from .adapters.patching.transaction import NOT_APPLIED, PatchSet, lock
from .errors import FsePatchError
from .fusion_core.decision.policy_file import load_policy
from .patches import ENGINES
from .report import REFUSED, PatchReport, Report

log = logging.getLogger("fse_patch")


@dataclass(frozen=True)
class _Active:
    engine: str
    here: standing.Standing
    patches: PatchSet

    def report(self) -> Report:
        failure = self.patches.failure
        states = _states(self.here, self.patches.state, {p.id for p in self.patches.patches})
        reason = "" if failure is None else str(failure)
        return Report(self.engine, self.here.version, states, reason, self.here.remark)


_active: dict[str, _Active] = {}
_refused: dict[str, Report] = {}


def _known(engine: str) -> None:
    if engine not in ENGINES:
        raise FsePatchError(f"{engine!r}: unknown engine; use {' or '.join(ENGINES)}")


def _standing(book: ledger.Ledger, version: str, effective: settings.Settings) -> standing.Standing:
    """Compare the installed release with the listed ones.

    Raises:
        FsePatchError: it is older than them, or our own package is incomplete.
    """
    here = standing.standing_of(book, version, effective.switches)
    for patch in here.patches:
        guards.check_factory(patch)
    return here


def _states(
    here: standing.Standing | None, state: Callable[[PatchSpec], str], usable: Collection[str]
) -> tuple[PatchReport, ...]:
    """Report every patch: what is wrong with it; that its families are left alone; or its state."""
    reports = []
    for patch in () if here is None else here.patches:
        problem = here.problems.get(patch.id) if here is not None else None
        if problem is not None:
            reports.append(PatchReport(patch.id, patch.target, REFUSED, str(problem)))
        else:
            now = state(patch) if patch.id in usable else NOT_APPLIED
            reports.append(PatchReport(patch.id, patch.target, now))
    return tuple(reports)


def _off(engine: str, version: str, here: standing.Standing | None, error: FsePatchError) -> Report:
    return Report(engine, version, _states(here, lambda _: NOT_APPLIED, ()), str(error))


def _failed(engine: str, failure: FsePatchError) -> None:
    child_environment.switch_off(engine)
    if engine in _active:  # while a module was imported, where nobody has an answer to read
        log.warning("%s: off: %s", engine, failure)


def _building() -> bool:
    """Return whether a model was built here with patches in, or is being built: there is no way back then."""
    models = sys.modules.get(f"{__package__}.adapters.role")
    return models is not None and bool(models.ACTIVE.get() or models.constructed())


def apply(engine: str, *, strict: bool | None = None, serving: bool = False) -> Report:
    """Patch an engine as `fse_patch.apply` says.

    ``serving``: called by the engine itself. What cannot be patched is served stock then, unless
    FSE_PATCH_STRICT is set; where that is some families alone, it is said when a model of one is built. A
    patch that fails later, while a module is imported, ends the process in strict mode, and where a model was
    built before: engines catch exceptions there.

    Raises:
        FsePatchError: as `fse_patch.apply`; a malformed policy, whoever calls.
    """
    _known(engine)
    with lock:
        if engine in _active:
            if _active[engine].patches.failure is None:
                _active[engine].patches.exits |= serving
                return _active[engine].report()
            _active.pop(engine).patches.revert()
        effective = settings.load()
        stop = next((s for s in (strict, effective.strict) if s is not None), not serving)
        load_policy(effective.policy_file)  # a malformed one must stop here, not in a worker
        book = ledger.load(engine)
        version, here = "", None
        try:
            version = guards.engine_version(book)
            here = _standing(book, version, effective)
            problem = here.blocking
            # Which family a server serves shows when it builds a model; see `adapters.start`.
            if problem is None and stop and not serving:
                problem = next(iter(here.refused.values()), None)
            if problem is not None:
                raise problem
            patches = PatchSet(
                book.facts.import_name,
                here.usable,
                stop,
                on_failure=lambda failure: _failed(engine, failure),
                building=_building,
            )
            patches.exits = serving
            patches.apply()
            if idle := here.idle(effective.switches):
                log.warning("%s %s: %s does nothing in this release", engine, version, ", ".join(idle))
        except FsePatchError as error:
            _refused[engine] = _off(engine, version, here, error)
            if stop or not (version or serving):
                raise
            return _refused[engine]
        _refused.pop(engine, None)
        standing.note(here)
        runtime.on_change(_publish)
        runtime.answer_with(status)
        _active[engine] = _Active(engine, here, patches)
        child_environment.switch_on(engine, {settings.STRICT: strict})
        return _active[engine].report()


def remove(engine: str) -> None:
    """Put everything of an engine back as it was, and switch its child processes off."""
    _known(engine)
    with lock:
        _refused.pop(engine, None)
        if (active := _active.pop(engine, None)) is not None:
            child_environment.switch_off(engine)
            standing.forget(engine)
            active.patches.revert()


def status() -> dict[str, Any]:
    """Return what is patched, decided, loaded and counted in this process, by engine."""
    with lock:
        reports = {**_refused, **{engine: active.report() for engine, active in _active.items()}}
    # Not imported: where no model was built, asking must not load torch.
    models = sys.modules.get(f"{__package__}.adapters.role")
    roles = [] if models is None else [fused_role.report() for fused_role in models.constructed()]
    apart = sys.modules.get(f"{__package__}.adapters.paired")
    roles += [] if apart is None else [role.report() for role in apart.constructed()]
    heads = sys.modules.get(f"{__package__}.adapters.head")
    held = [] if heads is None else [head.report() for head in heads.constructed()]
    return {
        engine: {
            **report.to_dict(),
            "pid": os.getpid(),
            "roles": [role for role in roles if role["engine"] == engine],
            "lm_heads": held if engine in _active else [],
            "decisions": [d for d in runtime.decisions() if d.get("engine", engine) == engine],
            "counters": runtime.counters(),
            "since": runtime.since(),
        }
        for engine, report in reports.items()
    }


def _publish() -> None:
    metrics.publish(status)
    if "vllm" in _active:
        status_endpoint.expose(lambda: runtime.answer("vllm"))
