"""What tests/kernels/test_execution.py tests of a layer, with each kernel's reference in its place: no Triton."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from ..fakes.triton_free import loaded

_MODULES: dict[str, ModuleType] = {}
with loaded(_MODULES):
    from ..kernels import test_execution as of_kernels
_LEFT_BEHIND = sorted(_MODULES.keys() & sys.modules.keys())

# Those of the layer; the others are of kernels themselves.
for _name in vars(of_kernels):
    if _name.startswith("test_") and _name != "test_silu_mul":
        globals()[_name] = getattr(of_kernels, _name)


@pytest.fixture(autouse=True)
def _without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in _MODULES.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_no_other_test_sees_these_modules() -> None:
    assert "fse_patch.fusion_core.forward.execution" in _MODULES
    assert _LEFT_BEHIND == []


def test_all_of_the_layers_tests_are_here() -> None:
    here = [name for name in globals() if name.startswith("test_")]
    assert "test_every_mode_gives_the_layer" in here
    assert len(here) >= 9
