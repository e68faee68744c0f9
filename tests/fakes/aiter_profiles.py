"""Releases of AITER as a caller meets them: signatures from the committed JSON, behaviour as facts.

with installed(profile("0.1.12")):
    ...  # `import aiter` gives that release's fake, and torch says that it is built for ROCm
"""

from __future__ import annotations

import enum
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

from . import aiter_kernels

SIGNATURES = json.loads(Path(__file__).with_name("aiter_signatures.json").read_text())
HEAD = SIGNATURES["commit"]
# Announced by others and not in a tag yet: where they stand is not known, so they go by keyword alone.
COMING = ("quant_dtype_a", "output", "no_combine")


class ActivationType(enum.Enum):
    """pybind enums have values and are no integers."""

    No = -1
    Silu = 0
    Gelu = 1
    Swiglu = 2


class QuantType(enum.Enum):
    No = 0
    per_Tensor = 1
    per_Token = 2
    per_1x32 = 3
    per_1x128 = 4
    per_128x128 = 5


class GateMode(enum.Enum):
    SEPARATED = "separated"
    INTERLEAVE = "interleave"


@dataclass(frozen=True)
class Profile:
    """One release.

    Args:
        state: tag or commit of the signatures.
        strides: for which numbers of experts `topk_softmax` honours them.
        wrapped: operations are opaque wrappers of operators that torch knows, with a schema.
        reinterprets: a wrong dtype is read as the right one; else it raises.
        grouped_strides: `biased_grouped_topk` honours the logits' row stride.
        extra: keywords of `fused_moe` beyond its signature.
        missing: symbols that its import leaves out.
        raises: what its import raises instead.
        foreign: it is PyPI's package of that name, tools for asynchronous iterators.
        faults: kernels that are wrong here beyond what is known, by name.
    """

    state: str = "v0.1.20.post1"
    strides: str = "all"
    wrapped: bool = False
    reinterprets: bool = True
    grouped_strides: bool = True
    extra: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    raises: Exception | None = None
    foreign: bool = False
    faults: dict[str, Callable[..., Any]] = field(default_factory=dict)


OLD = Profile(strides="none", wrapped=True, reinterprets=False, grouped_strides=False)
PROFILES: dict[str, Profile] = {
    "0.1.4": replace(OLD, state="v0.1.4", wrapped=False),
    "0.1.5, arg0 to arg4": replace(OLD, state="v0.1.5"),
    "0.1.10": replace(OLD, state="v0.1.10.post3"),
    "0.1.11, first strides": replace(OLD, state="v0.1.11", strides="powers of two"),
    "0.1.12, 7 hidden": replace(OLD, state="v0.1.12.post2", strides="powers of two"),
    "0.1.14, 7 hidden": replace(OLD, state="v0.1.14", strides="powers of two"),
    "0.1.19, 7 visible": Profile("v0.1.19", strides="powers of two"),
    "0.1.20, newest tag": Profile("v0.1.20.post1"),
    "newest": Profile(HEAD, extra=COMING),
}
# What is called aiter and cannot be used.
UNUSABLE: dict[str, Profile] = {
    "0.1.12 without ROCm": replace(
        PROFILES["0.1.12, 7 hidden"],
        missing=("topk_softmax", "biased_grouped_topk", "ActivationType", "QuantType"),
    ),
    "PyPI's aiter": Profile(foreign=True),
    "raises ImportError": Profile(raises=ImportError("libamdhip64.so: cannot open shared object file")),
    "raises RuntimeError": Profile(raises=RuntimeError("ROCm version file not found")),
}


def function(name: str, profile: Profile) -> Callable[..., Any]:
    """A fake operation with the signature that the profile's state has."""
    facts = SIGNATURES["states"][profile.state][name]
    scope = {"ActivationType": ActivationType, "QuantType": QuantType, "GateMode": GateMode}
    parameters = [
        inspect.Parameter(
            parameter,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=eval(default[0], scope) if default else inspect.Parameter.empty,
        )
        for parameter, *default in facts["parameters"]
    ]
    if name == "fused_moe":
        parameters += [
            inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in profile.extra
        ]
    signature = inspect.Signature(parameters)
    kernel = profile.faults.get(name, getattr(aiter_kernels, name, aiter_kernels.not_run))

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)  # a TypeError, as Python's own
        bound.apply_defaults()
        return kernel(profile, *bound.arguments.values())

    call.__name__ = call.__qualname__ = name
    if not (profile.wrapped and "compile_ops" in facts["decorators"]):
        call.__signature__ = signature  # type: ignore[attr-defined]
        return call
    return hidden(name, signature, call)


def hidden(name: str, signature: inspect.Signature, call: Callable[..., Any]) -> Callable[..., Any]:
    """What `torch_compile_guard` makes of an operation: a torch operator, behind a wrapper without a name."""
    operator = call
    if name == "topk_softmax":
        kinds = ["Tensor"] * 4 + ["bool", "SymInt", "str"]
        schema = [
            (f"Tensor(a{i}!) {p.name}" if kind == "Tensor" else f"{kind} {p.name}")
            + ("" if p.default is p.empty else f"={json.dumps(p.default)}")
            for i, (kind, p) in enumerate(zip(kinds, signature.parameters.values(), strict=False))
        ]
        library = torch.library.Library("aiter", "FRAGMENT")
        library.define(f"{name}({', '.join(schema)}) -> ()")
        library.impl(name, call, "CPU")
        LIBRARIES.append((library, name))
        operator = getattr(torch.ops.aiter, name)

    def wrapper_custom(*args: Any, **kwargs: Any) -> Any:
        return operator(*args, **kwargs)

    return wrapper_custom


LIBRARIES: list[tuple[torch.library.Library, str]] = []


def modules(profile: Profile) -> dict[str, ModuleType]:
    """The package as `sys.modules` has it."""
    if profile.foreign:
        other = ModuleType("aiter")
        other.preload = other.flatten = other.push_aiter = print  # type: ignore[attr-defined]
        return {"aiter": other}
    made = {
        n: ModuleType(n)
        for n in ("aiter", "aiter.fused_moe", "aiter.ops", "aiter.ops.shuffle", "aiter.ops.enum")
    }
    made["aiter"].__path__ = made["aiter.ops"].__path__ = []  # type: ignore[attr-defined]
    there = SIGNATURES["states"][profile.state]
    places = {
        "fused_moe": "aiter.fused_moe",
        "fused_topk": "aiter.fused_moe",
        "shuffle_weight": "aiter.ops.shuffle",
    }
    for name in there:
        if name not in profile.missing:
            setattr(made[places.get(name, "aiter")], name, function(name, profile))
    for enumeration in (ActivationType, QuantType):
        if enumeration.__name__ not in profile.missing:
            setattr(made["aiter"], enumeration.__name__, enumeration)
    flydsl = ("aiter.ops.flydsl", "aiter.ops.flydsl.moe_common")
    if any("GateMode" in p[-1] or "gate_mode" in p[0] for p in there["fused_moe"]["parameters"]):
        made |= {n: ModuleType(n) for n in flydsl}
        made[flydsl[1]].GateMode = GateMode  # type: ignore[attr-defined]
    return made


class _Raises:
    """Finds `aiter`, as any finder does, and raises when it is executed."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name == "aiter" else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        raise self.error


@contextmanager
def installed(profile: Profile | None, hip: str | None = "7.0", gpu: str = "gfx942") -> Iterator[None]:
    """`import aiter` gives the profile's fake; None: there is no such package.

    Args:
        hip: what `torch.version.hip` says.
        gpu: its architecture.
    """
    from fse_patch.fusion_core.kernels import aiter, aiter_check

    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "aiter"}
    with ExitStack() as stack:
        for name in before:
            del sys.modules[name]
        stack.enter_context(patch.object(torch.version, "hip", hip))
        stack.enter_context(patch.object(aiter, "architecture", lambda: gpu))
        if profile is not None and profile.raises is not None:
            stack.enter_context(patch.object(sys, "meta_path", [_Raises(profile.raises), *sys.meta_path]))
        elif profile is not None:
            made = modules(profile)
            for name, module in made.items():
                module.__spec__ = ModuleSpec(name, None, is_package=hasattr(module, "__path__"))
            sys.modules.update(made)
        aiter_check.usable.cache_clear()
        try:
            yield
        finally:
            aiter_check.usable.cache_clear()
            for name in [n for n in sys.modules if n.partition(".")[0] == "aiter"]:
                del sys.modules[name]
            sys.modules.update(before)
            while LIBRARIES:
                library, name = LIBRARIES.pop()
                library._destroy()
                vars(torch.ops.aiter).pop(name, None)
