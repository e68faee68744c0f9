"""AITER's answers on small inputs, held against the torch reference before anything relies on them.

What no signature tells shows here: strides that a release ignores, a dtype read as another one, a layout that
is not the expected one. Run it before graphs are captured: a kernel that aborts must do so at the start.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch

from ..decision.outcome import RoutingSpec
from .aiter import (
    AiterCaps,
    TopK,
    grouped_refusal,
    grouped_topk,
    probe,
    shared_refusal,
    softmax_topk,
    softmax_topk_shared,
)
from .aiter_experts import experts_refusal, fused_experts, shuffle
from .routing_reference import append_shared_slots, route

log = logging.getLogger("fse_patch")
# More than one row, or no stride would show.
TOKENS = 3
# Rounding of weights to float32, and of bfloat16 outputs.
WEIGHTS, OUTPUTS = 1e-5, 2e-2
GLM = RoutingSpec("sigmoid", True, 2.5, has_correction_bias=True)


def _logits(columns: int, wider: int, device: torch.device) -> torch.Tensor:
    """Draw rows of distinct values, far enough apart for one right choice, in a buffer that is ``wider``."""
    # Engines build with a default device and dtype of their own.
    draw = torch.Generator("cpu").manual_seed(columns)
    rows = [torch.randperm(columns + wider, generator=draw, device="cpu") for _ in range(TOKENS)]
    return (torch.stack(rows).to(torch.float32) / 16.0 - 2.0).to(device)[:, :columns]


def _difference(what: str, top_k: TopK, reference: TopK) -> str:
    """Say how a top-k is not that of the reference, in whatever order, or ""."""
    if [top_k[0].dtype, top_k[1].dtype] != [torch.float32, torch.int32]:
        return f"{what}: it gives {top_k[0].dtype} and {top_k[1].dtype}"
    (weights, ids), (right_weights, right_ids) = (
        [part.cpu() for part in pair] for pair in (top_k, reference)
    )
    order, right_order = ids.argsort(dim=1), right_ids.argsort(dim=1)
    if not torch.equal(ids.gather(1, order), right_ids.gather(1, right_order)):
        return f"{what}: other experts than the reference"
    off = (weights.gather(1, order) - right_weights.gather(1, right_order)).abs().max()
    return "" if float(off) <= WEIGHTS else f"{what}: weights are {float(off):.2g} off"


def check_softmax(caps: AiterCaps, device: torch.device) -> str:
    """Say what is wrong with the 5-argument top-k, or ""; 60 is Qwen1.5-MoE's number of experts."""
    for experts, renormalize in ((60, False), (60, True), (64, True)):
        logits = _logits(experts, 3, device)
        reference = route(logits, 4, RoutingSpec("softmax", renormalize))
        if fault := _difference("topk_softmax", softmax_topk(caps, logits, 4, renormalize), reference):
            return f"{fault} ({experts} experts)"
    return ""


def check_shared(caps: AiterCaps, device: torch.device) -> str:
    """Say what is wrong with the 7-argument top-k on strided logits, or ""."""
    if refusal := shared_refusal(caps, 64, 2, padding=False):
        return refusal
    logits, slots = _logits(66, 10, device), range(64, 66)
    reference = append_shared_slots(*route(logits[:, :64], 4, RoutingSpec("softmax", True)), slots, 0.0)
    reference[0][:, 4:] = logits[:, 64:].sigmoid()
    top_k = softmax_topk_shared(caps, logits, 4, slots, True)
    return _difference("topk_softmax of 7", top_k, reference)


def check_grouped(caps: AiterCaps, device: torch.device) -> str:
    """Say what is wrong with GLM's top-k, or "": it has to have the scale inside."""
    if refusal := grouped_refusal(caps, GLM, 128, 8):
        return refusal
    logits = _logits(128, 3, device)
    bias = 0.1 * _logits(128, 0, device)[0]
    reference = route(logits, 8, GLM, bias)
    return _difference("biased_grouped_topk", grouped_topk(caps, logits, bias, 8, GLM), reference)


def check_experts(caps: AiterCaps, device: torch.device) -> str:
    """Say what is wrong with `fused_moe` on five experts, the last of them a shared slot, or ""."""
    draw = torch.Generator("cpu").manual_seed(0)
    experts, hidden, width = 5, 128, 128

    def tensor(*shape: int) -> torch.Tensor:
        drawn = torch.randn(*shape, generator=draw, dtype=torch.float32, device="cpu") / math.sqrt(shape[-1])
        return drawn.to(torch.bfloat16).to(device)

    w13, w2 = tensor(experts, 2 * width, hidden), tensor(experts, hidden, width)
    states = tensor(TOKENS, hidden)
    if refusal := experts_refusal(caps, w13, w2, experts):
        return refusal
    ids = torch.tensor([[0, 3, 4], [2, 1, 4], [3, 2, 4]], dtype=torch.int32, device=device)
    shares = [[0.6, 0.4, 0.9], [0.5, 0.5, 0.2], [0.8, 0.2, 0.5]]
    weights = torch.tensor(shares, dtype=torch.float32, device=device)
    reference = torch.zeros(TOKENS, hidden, dtype=torch.float64, device=device)
    for row, columns in enumerate(ids.tolist()):
        for column, expert in enumerate(columns):
            gate, up = (w13[expert].double() @ states[row].double()).chunk(2)
            inner = w2[expert].double() @ (torch.nn.functional.silu(gate) * up)
            reference[row] += weights[row, column].double() * inner
    output = fused_experts(caps, states, *shuffle(caps, w13, w2), weights, ids)
    off = float((output.double() - reference).norm() / reference.norm())
    return "" if off <= OUTPUTS else f"fused_moe: its output is {off:.2g} off"


# What is not used any more where a check fails.
CHECKS: tuple[tuple[str, Callable[[AiterCaps, torch.device], str]], ...] = (
    ("topk_takes_shared", check_shared),
    ("topk_softmax", check_softmax),
    ("biased_grouped_topk", check_grouped),
    ("fused_moe", check_experts),
)


def failures(caps: AiterCaps, device: torch.device) -> dict[str, str]:
    """Return what of ``caps`` is not right on ``device``: operation -> what is wrong with it."""
    faults = {}
    for name, check in CHECKS:
        if getattr(caps, name):
            try:
                fault = check(caps, device)
            except Exception as error:  # a kernel that was not built, and whatever it says
                fault = f"{name}: {type(error).__name__}: {error}"
            if fault:
                faults[name] = fault
    return faults


def checked(caps: AiterCaps, device: torch.device) -> AiterCaps:
    """Return ``caps`` without what is not right here; one line in the log for each."""
    faults = failures(caps, device)
    for name, fault in faults.items():
        log.warning("AITER: %s is not used: %s", name, fault)
    return without(caps, faults)


def without(caps: AiterCaps, names: Iterable[str]) -> AiterCaps:
    """Return ``caps`` without some of its operations."""
    gone: dict[str, Any] = {name: False if name == "topk_takes_shared" else None for name in names}
    if "topk_softmax" in gone:
        gone["topk_takes_shared"] = False
    return dataclasses.replace(caps, **gone)


@cache
def usable(device: str) -> AiterCaps:
    """Return what this process may call on ``device``; asked once, and said in one line."""
    caps = probe()
    if caps.why:
        if torch.version.hip is not None:
            log.warning("AITER is not used: %s", caps.why)
        return caps
    return checked(caps, torch.device(device))
