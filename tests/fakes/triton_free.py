"""The modules that run kernels, where Triton is not installed: each operation is its own reference in torch.

What is imported within `loaded` is the importer's alone. Outside, an import of a kernel fails as before.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

KERNELS = "fse_patch.fusion_core.kernels"
MODES = "fse_patch.fusion_core.forward.modes"


class _Anything(ModuleType):
    """A module of Triton, as far as kernels look at it when they are imported."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda value: value


@contextmanager
def loaded(known: dict[str, ModuleType]) -> Iterator[None]:
    """Have these modules in place, and those that are imported within added to ``known``."""
    before = dict(sys.modules)
    language = _Anything("triton.language")
    triton = _Anything("triton")
    triton.language = language  # type: ignore[attr-defined]
    sys.modules |= {"triton": triton, "triton.language": language, **known}
    if not known:
        _references()
    try:
        yield
    finally:
        new = {name: module for name, module in sys.modules.items() if name not in before}
        for name, module in new.items():
            if _needs_triton(name):
                known[name] = module
                del sys.modules[name]
                parent, _, last = name.rpartition(".")
                vars(before.get(parent, ModuleType("none"))).pop(last, None)
        sys.modules.pop("triton", None)


def _needs_triton(name: str) -> bool:
    """Return whether it is a module that does not import without Triton."""
    own = (f"{KERNELS}.", MODES, "fse_patch.fusion_core.forward.execution", "tests.kernels", "triton")
    return name.startswith(own)


def _in_the_states_dtype(reference: Any) -> Any:
    return lambda states, *rest: reference(states, *rest).to(states.dtype)


def _references() -> None:
    """Import the kernels, and put their references in their place."""
    append, route, router_logits, silu_mul, experts, experts_fp8 = (
        importlib.import_module(f"{KERNELS}.{name}")
        for name in ("append", "route", "router_logits", "silu_mul", "experts", "experts_fp8")
    )
    append.append = append.reference
    route.route = route.reference
    router_logits.router_logits = lambda *of: router_logits.reference(*of).float()

    def silu(
        gate_up: torch.Tensor, states: Any = None, gate: Any = None, factor: float = 1.0
    ) -> torch.Tensor:
        return (silu_mul.reference(gate_up, states, gate) * factor).to(gate_up.dtype)

    silu_mul.silu_mul = silu
    for module in (experts, experts_fp8):
        module.small_experts = _in_the_states_dtype(module.reference)
    for mode in ("small", "fused", "split"):
        importlib.import_module(f"{MODES}.{mode}")
