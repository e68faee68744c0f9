"""Names and what they are bound to: find, replace, put back by identity."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ...errors import FsePatchError


@dataclass(frozen=True)
class Binding:
    """A name in a module or class, and the object that stood there.

    Args:
        owner: the module or class.
        name: the attribute.
        original: the object as stored, descriptors unbound.
        inherited: the owner inherits the attribute: putting it back then means deleting ours.
    """

    owner: ModuleType | type
    name: str
    original: Any
    inherited: bool = False

    def put(self, value: Any) -> None:
        """Bind the name to ``value``."""
        setattr(self.owner, self.name, value)

    def holds(self, value: Any) -> bool:
        """Return whether the owner itself now holds ``value``, by identity."""
        return vars(self.owner).get(self.name, self) is value

    def restore(self) -> None:
        """Put the original back."""
        if not self.inherited:
            setattr(self.owner, self.name, self.original)
        elif self.name in vars(self.owner):
            delattr(self.owner, self.name)

    @property
    def place(self) -> tuple[int, str]:
        """Return which name of which object this is."""
        return id(self.owner), self.name

    def __str__(self) -> str:
        return f"{self.owner.__name__}.{self.name}"

    @property
    def restored(self) -> bool:
        """Return whether the original is in place, by identity."""
        return self.name not in vars(self.owner) if self.inherited else self.holds(self.original)


def resolve(module: ModuleType, qualname: str) -> Binding:
    """Find the binding of ``qualname`` in an imported module, with the raw descriptor.

    Raises:
        FsePatchError: there is no such attribute.
    """
    owner: Any = module
    *path, name = qualname.split(".")
    for part in path:
        owner = vars(owner).get(part)
        if not isinstance(owner, type):
            raise FsePatchError(f"{module.__name__}:{qualname}: {part} is not a class there")
    if name in vars(owner):
        return Binding(owner, name, vars(owner)[name])
    for base in owner.__mro__[1:] if isinstance(owner, type) else ():
        if name in vars(base):
            return Binding(owner, name, vars(base)[name], inherited=True)
    raise FsePatchError(f"{module.__name__}:{qualname}: no such attribute")


def holders(import_name: str, value: object) -> Iterator[Binding]:
    """Find what is bound to ``value`` in a package's loaded modules: ``from X import Y`` copies too."""
    loaded: list[tuple[str, Any]] = list(sys.modules.items())
    for name, module in loaded:
        # Anything may stand in sys.modules; looking into a stand-in could import what it stands for.
        if isinstance(module, ModuleType) and (name == import_name or name.startswith(f"{import_name}.")):
            for key, held in list(vars(module).items()):
                if held is value:
                    yield Binding(module, key, value)
