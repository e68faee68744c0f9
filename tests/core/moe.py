"""One MoE layer for tests: decisions, roles, and routing written a second time in plain Python floats."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fse_patch.adapters.role import EngineSlots
from fse_patch.adapters.start import Start
from fse_patch.fusion_core.checkpoint.families import Role, SharedWeight, family_of
from fse_patch.fusion_core.checkpoint.naming import TensorNaming
from fse_patch.fusion_core.checkpoint.sources import FolderSource
from fse_patch.fusion_core.checkpoint.weight_files import (
    CheckpointFiles,
    WeightFiles,
    read_headers,
    weight_files,
)
from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.decision.outcome import Decision, Merged, MoeSpec, RoutingSpec
from fse_patch.fusion_core.forward.layer import FusedLayer
from fse_patch.fusion_core.forward.plan import ModeCounter, always
from fse_patch.fusion_core.forward.router import FusedRouter
from fse_patch.settings import Settings


def moe_spec(
    layout: ExpertLayout,
    routing: RoutingSpec | None = None,
    shared_weight: SharedWeight = "sigmoid_gate",
    layers: tuple[int, ...] = (0,),
) -> MoeSpec:
    """Sparse layers; Qwen's routing if None."""
    return MoeSpec(layout, routing or RoutingSpec("softmax", True), shared_weight, layers)


def decision(
    layout: ExpertLayout,
    routing: RoutingSpec | None = None,
    shared_weight: SharedWeight = "sigmoid_gate",
    layers: tuple[int, ...] = (0,),
    role: Role = "main",
    model_type: str = "qwen2_moe",
) -> Merged:
    """A decision to fuse ``layers``."""
    return Merged(
        role=role,
        engine="vllm",
        model_type=model_type,
        rule="unquantised",
        moe=moe_spec(layout, routing, shared_weight, layers),
    )


def stored_as(method: str, formats: tuple[str, ...], engine: str = "vllm") -> Merged:
    """A decision to fuse experts of ``formats``, of a checkpoint that declares ``method``."""
    decided = decision(ExpertLayout(4, 1, 2, 8, 4), model_type="qwen3_next")
    return replace(decided, engine=engine, quant_method=method, formats=formats)


def naming_of(model_type: str, layers: int) -> TensorNaming:
    """The tensor names of a model of ``layers`` layers."""
    family = family_of(model_type)
    assert family is not None
    return TensorNaming(family, layers)


def start_of(decided: Decision, checkpoint: Path | None = None, **changes: Any) -> Start:
    """The start of a role: one mode, two layers and default settings where nothing else is given."""
    assert decided.moe is not None
    given: dict[str, Any] = {
        "naming": naming_of(decided.model_type, 2),
        "plan": always("fused", "test"),
        "settings": Settings(),
    }
    source = FolderSource(checkpoint or Path())
    names = weight_files(source, decided.engine).names if checkpoint else ()
    digest = read_headers(source, WeightFiles(names)).digest
    files = CheckpointFiles(source, names, digest)
    return Start(decided, decided.moe, files=files, **{**given, **changes})


class Slots(EngineSlots):
    """An engine whose parameters take a slot's part by copying it, in one process."""

    def number_at(self, start: Start, place: int) -> int | None:
        return place

    def take(self, parameter: Any, part: Any, name: str) -> bool:
        rows = parameter.data[part.slot]
        width = rows.shape[0] // 2
        place = {"w1": rows[:width], "w3": rows[width:], "w2": rows}[part.shard]
        place.copy_(part.tensor)
        return True

    def share(self, experts: Any) -> tuple[int, int]:
        return 0, 1

    def refresh(self, layer: FusedLayer) -> None:
        pass


def router_of(moe: MoeSpec, tensors: Mapping[str, torch.Tensor], mlp: str, layer: int) -> FusedRouter:
    """The router of a layer, its gates from the checkpoint's tensors below ``mlp``."""
    row = tensors.get(f"{mlp}shared_expert_gate.weight")
    return FusedRouter(
        layer,
        moe,
        ModeCounter(),
        shared_gate=None if row is None else lambda states: states @ row.T,
        correction_bias=tensors.get(f"{mlp}gate.e_score_correction_bias"),
    )


@dataclass(frozen=True)
class Routed:
    """A layer to route, with what a router needs: float64 logits, bias and shared gate logits."""

    layout: ExpertLayout
    spec: RoutingSpec
    logits: torch.Tensor
    bias: torch.Tensor | None
    gate: torch.Tensor | None

    def with_spec(self, **changes: Any) -> Routed:
        return replace(self, spec=replace(self.spec, **changes))


def _largest(values: list[float], among: list[int], count: int) -> list[int]:
    return sorted(sorted(among, key=lambda i: -values[i])[:count])


def choose(logits: list[float], top_k: int, spec: RoutingSpec, bias: list[float] | None) -> dict[int, float]:
    """Expert to weight for one token, by the definition of each family."""
    experts = list(range(len(logits)))
    if spec.scoring == "softmax":
        total = math.fsum(math.exp(x) for x in logits)
        scores = [math.exp(x) / total for x in logits]
        allowed, choice = experts, scores
    else:
        scores = [1 / (1 + math.exp(-x)) for x in logits]
        choice = scores if bias is None else [s + b for s, b in zip(scores, bias, strict=True)]
        size = len(logits) // spec.num_expert_group
        members = [experts[g * size : (g + 1) * size] for g in range(spec.num_expert_group)]
        best = 1 if bias is None else 2
        marks = [math.fsum(sorted((choice[i] for i in group), reverse=True)[:best]) for group in members]
        kept = _largest(marks, list(range(spec.num_expert_group)), spec.topk_group)
        allowed = [i for group in kept for i in members[group]]
    chosen = _largest(choice, allowed, top_k)
    weights = {i: scores[i] for i in chosen}
    if spec.renormalize:
        whole = math.fsum(weights.values())
        weights = {i: w / whole for i, w in weights.items()}
    return {i: w * spec.routed_scaling_factor for i, w in weights.items()}


def shared_weight(gate: float | None) -> float:
    """Net weight of the shared expert: sigmoid of its gate, or 1."""
    return 1.0 if gate is None else 1 / (1 + math.exp(-gate))


def wrong(case: Routed, weights: torch.Tensor, ids: torch.Tensor, tolerance: float) -> list[str]:
    """Everything in which a top-k differs from the definition, in words."""
    layout, found = case.layout, []
    shape = [case.logits.shape[0], layout.fused_top_k]
    if list(weights.shape) != shape or list(ids.shape) != shape:
        return [f"shapes {list(weights.shape)} and {list(ids.shape)}, expected {shape}"]
    if not (weights.is_contiguous() and ids.is_contiguous()):
        found.append("not contiguous")
    if ids.dtype != torch.int32:
        found.append(f"ids are {ids.dtype}")
    bias = None if case.bias is None else case.bias.tolist()
    gates = [None] * shape[0] if case.gate is None else case.gate[:, 0].tolist()
    rows = zip(case.logits.tolist(), gates, weights.tolist(), ids.tolist(), strict=True)
    for token, (logits, gate, row, slots) in enumerate(rows):
        expected = choose(logits, layout.top_k, case.spec, bias)
        routed = dict(zip(slots[: layout.top_k], row, strict=False))
        if sorted(routed) != sorted(expected):
            found.append(f"token {token}: chose {sorted(routed)}, not {sorted(expected)}")
        elif any(abs(routed[i] - w) > tolerance for i, w in expected.items()):
            found.append(f"token {token}: routed weights {routed}, not {expected}")
        if slots[layout.top_k :] != list(layout.shared_slots):
            found.append(f"token {token}: shared slots {slots[layout.top_k :]}")
        net = shared_weight(gate)
        if any(abs(w - net) > tolerance for w in row[layout.top_k :]):
            found.append(f"token {token}: shared weights {row[layout.top_k :]}, not {net}")
    return found
