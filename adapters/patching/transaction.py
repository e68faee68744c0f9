"""Transaction: the patches of an engine are put in, all or none, and taken out by identity.

Knows no engine by name.
"""

from __future__ import annotations

import importlib
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from functools import reduce
from types import FunctionType
from typing import Any, NoReturn

from ...errors import FsePatchError, RefusedError
from . import import_hooks
from .bindings import Binding, holders, resolve
from .spec import PatchSpec

log = logging.getLogger("fse_patch")
lock = threading.RLock()

APPLIED = "applied"
WAITING = "waiting for import"
NOT_APPLIED = "not applied"


def _factory(patch: PatchSpec) -> Callable[[Any], Any]:
    module, _, name = patch.factory.partition(":")
    factory = reduce(getattr, name.split("."), importlib.import_module(module))
    if not callable(factory):
        raise FsePatchError(f"patch {patch.id}: {patch.factory} is not callable")
    return factory


def _replacement(patch: PatchSpec, original: Any) -> Any:
    factory = _factory(patch)
    if isinstance(original, (staticmethod, classmethod)):
        made = factory(original.__func__)
        return made if isinstance(made, (staticmethod, classmethod)) else type(original)(made)
    made = factory(original)
    if made is original:
        raise FsePatchError(f"patch {patch.id}: {patch.factory} returned the original")
    if type(original) is FunctionType and type(made) is not FunctionType:
        # A proxy is opaque to torch.compile and inspect, and a callable object does not bind as a method.
        raise FsePatchError(f"patch {patch.id}: {patch.factory} must return a plain function")
    return made


def _check_origin(patch: PatchSpec, original: Any) -> None:
    """Check that the target holds what the fingerprint was taken of."""
    plain = original.__func__ if isinstance(original, (staticmethod, classmethod)) else original
    if isinstance(plain, (FunctionType, type)):
        origin = f"{plain.__module__}:{plain.__qualname__}"
        if origin != patch.holds:
            detail = f"patch {patch.id}: {patch.target} holds {origin}, not {patch.holds}"
            raise RefusedError("fingerprint", f"{detail}; another plugin may have replaced it")


class Change:
    """Names that one patch rebinds.

    Args:
        patch: its module is imported.
        import_name: top-level package of the engine, below which stale bindings are looked for.
    """

    def __init__(self, patch: PatchSpec, import_name: str) -> None:
        self.patch = patch
        self._import_name = import_name
        target = resolve(sys.modules[patch.module], patch.qualname)
        self._old = target.original
        _check_origin(patch, self._old)
        self._new = _replacement(patch, self._old)
        # Unless the engine holds the replacement already (a class of its own), whoever holds it later got it
        # from us, by a ``from X import Y`` after the patch.
        self._ours = next(holders(import_name, self._new), None) is None
        self._bindings = [target]
        if not patch.imported and not isinstance(target.owner, type):
            stale = holders(import_name, self._old)
            self._bindings.extend(b for b in stale if b.place != target.place)

    def make(self) -> None:
        """Rebind every name. After an exception, `undo` puts back what was changed."""
        for binding in self._bindings:
            binding.put(self._new)
        log.debug("%s: %s, %d names rebound", self.patch.id, self.patch.target, len(self._bindings))

    def undo(self) -> list[str]:
        """Put the originals back, also where the replacement was imported since; return what resists."""
        known = {b.place for b in self._bindings}
        late = list(holders(self._import_name, self._new)) if self._ours else []
        stuck = []
        for binding in [
            *(Binding(b.owner, b.name, self._old) for b in late if b.place not in known),
            *reversed(self._bindings),
        ]:
            if not binding.restored and not binding.holds(self._new):
                log.warning("%s: someone else has replaced %s since", self.patch.id, binding)
            try:
                binding.restore()
            except Exception as error:  # whatever an owner's __setattr__ raises: the others still go back
                log.error("%s: %s: %s", self.patch.id, binding, error)
            if not binding.restored:
                stuck.append(str(binding))
        return stuck


class PatchSet:
    """Patches of one engine in this process.

    Args:
        import_name: top-level package of the engine.
        patches: those for the installed release, guards passed, in order.
        strict: an import during which a patch cannot be put in fails; otherwise the engine stays stock.
        building: says whether something was built on the patches: then such an import fails in any case.
        on_failure: told of a failure, after everything was taken out.

    Attributes:
        exits: such an import ends the process: engines catch exceptions of imports, and go on with another
            implementation of the model.
        failure: why everything was taken out, or None.
    """

    def __init__(
        self,
        import_name: str,
        patches: Sequence[PatchSpec],
        strict: bool = True,
        on_failure: Callable[[FsePatchError], None] | None = None,
        building: Callable[[], bool] = lambda: False,
    ) -> None:
        self.import_name = import_name
        self.patches = tuple(patches)
        self.strict = strict
        self.exits = False
        self.failure: FsePatchError | None = None
        self._on_failure = on_failure
        self._building = building
        self._changes: dict[str, Change] = {}
        self._imported: set[str] = set()
        self._busy = False

    def apply(self) -> None:
        """Patch the modules that are imported, and the others when they are. Twice is once.

        Raises:
            FsePatchError: a patch could not be put in; the engine is as before.
        """
        with lock:
            self.failure = None
            import_hooks.subscribe(self)
            # All hooks before the first factory: it may import modules of the engine.
            self._imported = {m for m in {p.module for p in self.patches} if not import_hooks.arm(m)}
            try:
                self._put()
            except FsePatchError:
                import_hooks.unsubscribe(self)
                raise

    def imported(self, module: str) -> None:
        """Put in what waited for ``module``; called by its import.

        Raises:
            FsePatchError: a patch could not be put in, now or earlier: in strict mode, or where something was
                built.
        """
        with lock:
            if all(p.module != module for p in self.patches):
                return
            self._imported.add(module)
            try:
                if self.failure is not None:
                    raise self.failure
                self._put()
            except FsePatchError as error:
                if not (self.strict or self._building()):
                    return
                if self.exits:
                    print(f"fse_patch: {error}", file=sys.stderr, flush=True)
                    raise SystemExit(error.exit_status) from error
                raise

    def revert(self) -> None:
        """Put every original back, last patch first, and wait for no more imports.

        Raises:
            FsePatchError: a name could not be put back; the others were.
        """
        with lock:
            import_hooks.unsubscribe(self)
            if stuck := self._take_out():
                raise FsePatchError(f"could not be put back: {', '.join(stuck)}; restart the process")

    def state(self, patch: PatchSpec) -> str:
        """Say whether a patch is in, waits for its module, or was taken out after a failure."""
        if patch.id in self._changes:
            return APPLIED
        return WAITING if self.failure is None else NOT_APPLIED

    def _is_due(self, patch: PatchSpec) -> bool:
        return patch.module in self._imported and patch.id not in self._changes

    def _put(self) -> None:
        if self._busy:
            return  # a factory's module, itself incomplete, imports the engine: the outer call goes on after
        self._busy = True
        try:
            while patch := next((p for p in self.patches if self._is_due(p)), None):
                try:
                    change = Change(patch, self.import_name)
                    self._changes[patch.id] = change
                    change.make()
                except Exception as error:
                    self._fail(patch, error)
        finally:
            self._busy = False

    def _fail(self, patch: PatchSpec, error: Exception) -> NoReturn:
        for name in self._take_out():
            log.error("%s could not be put back; restart the process", name)
        if not isinstance(error, FsePatchError):
            text = " ".join(str(error).split())
            failure = FsePatchError(f"patch {patch.id} of {patch.target}: {type(error).__name__}: {text}")
            failure.__cause__ = error
        else:
            failure = error
        self.failure = failure
        if self._on_failure is not None:
            self._on_failure(failure)
        raise failure

    def _take_out(self) -> list[str]:
        stuck = []
        while self._changes:
            _, change = self._changes.popitem()
            stuck.extend(change.undo())
        return stuck
