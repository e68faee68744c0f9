"""The check at the start finds what is wrong with an AITER that looks right, and turns that alone off."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fse_patch.fusion_core.kernels import aiter, aiter_check

from ..fakes import aiter_kernels
from ..fakes.aiter_profiles import PROFILES, UNUSABLE, Profile, installed

NEWEST = PROFILES["newest"]
ALL = ("topk_softmax", "topk_takes_shared", "biased_grouped_topk", "fused_moe")
Kernel = Callable[..., Any]


def on(profile: Profile, **conditions: Any) -> tuple[set[str], list[str]]:
    """What is usable, and what the log says."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    aiter_check.log.addHandler(handler)
    try:
        with installed(profile, **conditions):
            caps = aiter_check.usable("cpu")
            assert aiter_check.usable("cpu") is caps
    finally:
        aiter_check.log.removeHandler(handler)
    return {name for name in ALL if getattr(caps, name)}, lines


@pytest.mark.parametrize("name", PROFILES)
def test_what_is_right_is_used(name: str) -> None:
    usable, lines = on(PROFILES[name])
    with installed(PROFILES[name]):
        takes_shared = aiter.probe().topk_takes_shared
    assert usable == (set(ALL) if takes_shared else set(ALL) - {"topk_takes_shared"})
    assert lines == []


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_cannot_be_used_is_said_in_one_line(name: str) -> None:
    usable, (line,) = on(UNUSABLE[name])
    assert usable == set()
    assert line.startswith("AITER is not used: aiter")


def test_without_rocm_nothing_is_said() -> None:
    assert on(NEWEST, hip=None) == (set(), [])


def strides_ignored(profile: Profile, *args: Any) -> None:
    aiter_kernels.topk_softmax(replace(profile, strides="none"), *args)


def scale_left_out(profile: Profile, *args: Any) -> None:
    aiter_kernels.biased_grouped_topk(profile, *args[:-1], 1.0)


def unscaled_topk(profile: Profile, weights: torch.Tensor, *args: Any) -> None:
    aiter_kernels.topk_softmax(profile, weights, *args)
    weights *= 1.01


def other_experts(profile: Profile, weights: torch.Tensor, ids: torch.Tensor, *args: Any) -> None:
    aiter_kernels.topk_softmax(profile, weights, ids, *args)
    ids[1] = (ids[1] + 1) % 60


def another_layout(profile: Profile, x: torch.Tensor, *args: Any) -> torch.Tensor:
    out = x.flip(-1).clone()
    out.is_shuffled = True  # type: ignore[attr-defined]
    return out


def up_before_gate(profile: Profile, states: torch.Tensor, w1: torch.Tensor, *args: Any) -> torch.Tensor:
    swapped = torch.cat(list(w1.chunk(2, dim=1))[::-1], dim=1)
    swapped.is_shuffled = w1.is_shuffled  # type: ignore[attr-defined]
    return aiter_kernels.fused_moe(profile, states, swapped, *args)


def last_slot_dropped(
    profile: Profile, states: torch.Tensor, w1: Any, w2: Any, w: Any, *args: Any
) -> torch.Tensor:
    return aiter_kernels.fused_moe(profile, states, w1, w2, w * torch.tensor([1.0, 1.0, 0.0]), *args)


def not_built(*_: Any) -> None:
    raise RuntimeError("module_moe_asm: hipcc not found")


# Kernel, what is wrong with it, what is not used then, and what the line says.
FAULTS: list[tuple[str, Kernel, set[str], str]] = [
    ("topk_softmax", strides_ignored, {"topk_takes_shared"}, "other experts"),
    ("topk_softmax", unscaled_topk, {"topk_softmax", "topk_takes_shared"}, "weights are"),
    ("topk_softmax", other_experts, {"topk_softmax", "topk_takes_shared"}, "other experts"),
    ("topk_softmax", not_built, {"topk_softmax", "topk_takes_shared"}, "hipcc not found"),
    ("biased_grouped_topk", scale_left_out, {"biased_grouped_topk"}, "weights are"),
    ("biased_grouped_topk", not_built, {"biased_grouped_topk"}, "hipcc not found"),
    ("shuffle_weight", another_layout, {"fused_moe"}, "output is"),
    ("fused_moe", up_before_gate, {"fused_moe"}, "output is"),
    ("fused_moe", last_slot_dropped, {"fused_moe"}, "output is"),
    ("fused_moe", not_built, {"fused_moe"}, "hipcc not found"),
]


@pytest.mark.parametrize(
    ("kernel", "fault", "off", "words"), FAULTS, ids=lambda x: getattr(x, "__name__", None)
)
def test_what_is_wrong_is_not_used(kernel: str, fault: Kernel, off: set[str], words: str) -> None:
    usable, lines = on(replace(NEWEST, faults={kernel: fault}))
    assert usable == set(ALL) - off
    assert any(words in line for line in lines)
    assert all(line.startswith("AITER: ") for line in lines)
    assert len(lines) <= len(off)


def test_a_check_that_is_left_out_finds_nothing() -> None:
    """The control of the faults above."""
    with installed(replace(NEWEST, faults={"fused_moe": last_slot_dropped})):
        found = aiter.probe()
        assert all(getattr(found, name) for name in ALL)


def test_one_row_would_not_show_a_stride(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aiter_check, "TOKENS", 1)
    with installed(replace(NEWEST, faults={"topk_softmax": strides_ignored})):
        assert aiter_check.check_shared(aiter.probe(), torch.device("cpu")) == ""
