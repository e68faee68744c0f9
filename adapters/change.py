"""What one patch changes: made once, and undone by identity."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from functools import reduce
from types import FunctionType
from typing import Any

from ..errors import FsePatchError, RefusedError
from .bindings import Binding, holders, resolve
from .spec import PatchSpec

log = logging.getLogger("fse_patch")


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
    """The fingerprint was taken of ``source``: is that what the target holds?"""
    plain = original.__func__ if isinstance(original, (staticmethod, classmethod)) else original
    if isinstance(plain, (FunctionType, type)):
        origin = f"{plain.__module__}:{plain.__qualname__}"
        if origin != patch.holds:
            detail = f"patch {patch.id}: {patch.target} holds {origin}, not {patch.holds}"
            raise RefusedError("fingerprint", f"{detail}; another plugin may have replaced it")


class Change:
    """The names that one patch rebinds.

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
        """Put the originals back, also where the replacement was imported since; returns what resists."""
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
