"""Put the patches of an engine in, all or none, and take them out by identity. Knows no engine by name."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NoReturn

from ..errors import FsePatchError
from . import hooks
from .change import Change
from .spec import PatchSpec

log = logging.getLogger("fse_patch")
lock = threading.RLock()

APPLIED = "applied"
WAITING = "waiting for import"
NOT_APPLIED = "not applied"


class PatchSet:
    """The patches of one engine in this process.

    Args:
        import_name: top-level package of the engine.
        patches: those for the installed release, guards passed, in order.
        strict: an import during which a patch cannot be put in fails; otherwise the engine stays stock.
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
    ) -> None:
        self.import_name = import_name
        self.patches = tuple(patches)
        self.strict = strict
        self.exits = False
        self.failure: FsePatchError | None = None
        self._on_failure = on_failure
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
            hooks.subscribe(self)
            # All hooks before the first factory: it may import modules of the engine.
            self._imported = {m for m in {p.module for p in self.patches} if not hooks.arm(m)}
            try:
                self._put()
            except FsePatchError:
                hooks.unsubscribe(self)
                raise

    def imported(self, module: str) -> None:
        """Put in what waited for ``module``; called by its import.

        Raises:
            FsePatchError: in strict mode, a patch could not be put in, now or earlier.
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
                if self.strict and self.exits:
                    print(f"fse_patch: {error}", file=sys.stderr, flush=True)
                    raise SystemExit(error.exit_status) from error
                if self.strict:
                    raise

    def revert(self) -> None:
        """Put every original back, last patch first, and wait for no more imports.

        Raises:
            FsePatchError: a name could not be put back; the others were.
        """
        with lock:
            hooks.unsubscribe(self)
            if stuck := self._take_out():
                raise FsePatchError(f"could not be put back: {', '.join(stuck)}; restart the process")

    def state(self, patch: PatchSpec) -> str:
        """Whether a patch is in, waits for its module, or was taken out after a failure."""
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
