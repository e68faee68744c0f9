"""apply, remove and status: the ledger, its guards and its patches put together. Loaded at the first call."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import child_environment, metrics, runtime, settings, status_endpoint
from .adapters.patching import guards, ledger
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
    version: str
    patches: PatchSet

    def report(self) -> Report:
        failure = self.patches.failure
        states = tuple(PatchReport(p.id, p.target, self.patches.state(p)) for p in self.patches.patches)
        return Report(self.engine, self.version, states, "" if failure is None else str(failure))


_active: dict[str, _Active] = {}
_refused: dict[str, Report] = {}


def _known(engine: str) -> None:
    if engine not in ENGINES:
        raise FsePatchError(f"{engine!r}: unknown engine; use {' or '.join(ENGINES)}")


def _guard(book: ledger.Ledger, patches: tuple[PatchSpec, ...]) -> dict[str, FsePatchError]:
    """Return what is wrong, by patch."""
    errors: dict[str, FsePatchError] = {}
    for patch in patches:
        try:
            guards.check_source(book, patch)
            guards.check_factory(patch)
        except FsePatchError as error:
            errors[patch.id] = error
    return errors


def _declined(
    engine: str,
    version: str,
    patches: tuple[PatchSpec, ...],
    error: FsePatchError,
    errors: Mapping[str, FsePatchError],
) -> Report:
    reports = tuple(
        PatchReport(p.id, p.target, REFUSED, str(errors[p.id]))
        if p.id in errors
        else PatchReport(p.id, p.target, NOT_APPLIED)
        for p in patches
    )
    return Report(engine, version, reports, str(error))


def _failed(engine: str, failure: FsePatchError) -> None:
    child_environment.switch_off(engine)
    if engine in _active:  # while a module was imported, where nobody has an answer to read
        log.warning("%s: off: %s", engine, failure)


def apply(
    engine: str, *, strict: bool | None = None, allow_untested: bool | None = None, serving: bool = False
) -> Report:
    """Patch an engine as `fse_patch.apply` says.

    ``serving``: called by the engine itself. In strict mode, a patch that fails later, while a module is
    imported, then ends the process: engines catch exceptions there.
    """
    _known(engine)
    with lock:
        if engine in _active:
            if _active[engine].patches.failure is None:
                _active[engine].patches.exits |= serving
                return _active[engine].report()
            _active.pop(engine).patches.revert()
        effective = settings.load()
        stop = effective.strict if strict is None else strict
        load_policy(effective.policy_file)  # a malformed one must stop here, not in a worker
        book = ledger.load(engine)
        version = guards.engine_version(book)
        chosen = book.patches
        errors: dict[str, FsePatchError] = {}
        try:
            chosen = guards.check_version(
                book, version, effective.allow_untested if allow_untested is None else allow_untested
            )
            chosen = tuple(p for p in chosen if p.setting is None or p.setting in effective.switches)
            if errors := _guard(book, chosen):
                raise next(iter(errors.values()))
            patches = PatchSet(
                book.facts.import_name,
                chosen,
                stop,
                on_failure=lambda failure: _failed(engine, failure),
            )
            patches.exits = serving
            patches.apply()
        except FsePatchError as error:
            _refused[engine] = _declined(engine, version, chosen, error, errors)
            if stop:
                raise
            return _refused[engine]
        _refused.pop(engine, None)
        runtime.on_change(_publish)
        runtime.answer_with(status)
        _active[engine] = _Active(engine, version, patches)
        child_environment.switch_on(
            engine, {settings.STRICT: strict, settings.ALLOW_UNTESTED: allow_untested}
        )
        return _active[engine].report()


def remove(engine: str) -> None:
    """Put everything of an engine back as it was, and switch its child processes off."""
    _known(engine)
    with lock:
        _refused.pop(engine, None)
        if (active := _active.pop(engine, None)) is not None:
            child_environment.switch_off(engine)
            active.patches.revert()


def status() -> dict[str, Any]:
    """Return what is patched, decided, loaded and counted in this process, by engine."""
    with lock:
        reports = {**_refused, **{engine: active.report() for engine, active in _active.items()}}
    # Not imported: where no model was built, asking must not load torch.
    models = sys.modules.get(f"{__package__}.adapters.role")
    roles = [] if models is None else [fused_role.report() for fused_role in models.constructed()]
    return {
        engine: {
            **report.to_dict(),
            "pid": os.getpid(),
            "roles": [role for role in roles if role["engine"] == engine],
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
