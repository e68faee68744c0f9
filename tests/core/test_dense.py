"""A fused layer end to end in float64: remap, route, E+S slots against routed experts plus a shared MLP."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn.functional import silu

from fse_patch.fusion_core.checkpoint.families import FamilySpec, families
from fse_patch.fusion_core.checkpoint.naming import TensorNaming
from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.decision.outcome import RoutingSpec
from fse_patch.fusion_core.forward.plan import ModeCounter
from fse_patch.fusion_core.forward.router import FusedRouter
from fse_patch.fusion_core.weights.remap import Remap, SlotTensor

from .moe import choose, moe_spec

H, I, E, K, TOKENS = 12, 6, 11, 3, 7  # noqa: E741
FAMILIES = {family.name: family for family in families()}
FAMILY = {"sigmoid_gate": FAMILIES["qwen2_moe"], "constant": FAMILIES["glm4_moe"]}
SLOTS = [1, 2, 4, 8]
Change = Callable[[SlotTensor], SlotTensor]


def mlp(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


class Layer:
    """Random weights of one MoE layer, as a checkpoint holds them."""

    def __init__(self, family: FamilySpec, slots: int) -> None:
        torch.manual_seed(slots)
        self.family, self.layout = family, ExpertLayout(E, slots, K, H, I)
        gated = family.shared_weight == "sigmoid_gate"
        self.spec = (
            RoutingSpec("softmax", False)
            if gated
            else RoutingSpec("sigmoid", True, 2.5, has_correction_bias=True)
        )
        self.tensors = {
            f"model.layers.0.mlp.{owner}{name}.weight": self.random(*shape)
            for owner, width in [
                (f"{family.shared_module}.", slots * I),
                *((f"experts.{e}.", I) for e in range(E)),
            ]
            for name, shape in [
                ("gate_proj", (width, H)),
                ("up_proj", (width, H)),
                ("down_proj", (H, width)),
            ]
        }
        self.router = self.random(E, H)
        self.shared_gate = self.random(1, H) if gated else None
        self.bias = None if gated else self.random(E)
        self.x = self.random(TOKENS, H)

    @staticmethod
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    def expert(self, owner: str, x: torch.Tensor) -> torch.Tensor:
        names = (f"model.layers.0.mlp.{owner}{p}_proj.weight" for p in ("gate", "up", "down"))
        return mlp(x, *(self.tensors[n] for n in names))

    def unfused(self) -> torch.Tensor:
        """k routed experts, and the wide shared MLP beside them."""
        bias = None if self.bias is None else self.bias.tolist()
        out = torch.zeros_like(self.x)
        for token, logits in enumerate((self.x @ self.router.T).tolist()):
            for expert, weight in choose(logits, K, self.spec, bias).items():
                out[token] += weight * self.expert(f"experts.{expert}.", self.x[token])
        shared = self.expert(f"{self.family.shared_module}.", self.x)
        gate = 1.0 if self.shared_gate is None else (self.x @ self.shared_gate.T).sigmoid()
        return out + gate * shared

    def slots(self, change: Change) -> tuple[torch.Tensor, torch.Tensor]:
        """w13 and w2 of E+S experts, filled from the remapped stream."""
        w13 = torch.full((self.layout.num_experts, 2 * I, H), float("nan"), dtype=torch.float64)
        w2 = torch.full((self.layout.num_experts, H, I), float("nan"), dtype=torch.float64)
        place = {
            "w1": lambda e: w13[e, :I],
            "w3": lambda e: w13[e, I:],
            "w2": lambda e: w2[e],
        }
        for item in self.remapped():
            if isinstance(item, SlotTensor):
                item = change(item)
                place[item.shard](item.slot).copy_(item.tensor)
                continue
            *_, expert, projection, _ = item[0].split(".")
            shard = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[projection]
            place[shard](int(expert)).copy_(item[1])
        return w13, w2

    def remapped(self) -> Iterator[tuple[str, torch.Tensor] | SlotTensor]:
        naming = TensorNaming(self.family, 1)
        return Remap(self.layout, "main", naming, [0])(self.tensors.items())

    def fused(self, change: Change = lambda part: part, slot_weight: float = 1.0) -> torch.Tensor:
        """One pass over k+S columns."""
        gate = self.shared_gate
        router = FusedRouter(
            0,
            moe_spec(self.layout, self.spec, self.family.shared_weight),
            ModeCounter(),
            shared_gate=None if gate is None else lambda x: x @ gate.T,
            correction_bias=self.bias,
        )
        weights, ids = router(self.x, self.x @ self.router.T)
        weights[:, K:] *= slot_weight
        w13, w2 = self.slots(change)
        out = torch.zeros_like(self.x)
        for token, row in enumerate(ids.tolist()):
            for weight, e in zip(weights[token], row, strict=True):
                out[token] += weight * mlp(self.x[token], w13[e, :I], w13[e, I:], w2[e])
        return out


def off_by_1_percent(part: SlotTensor) -> SlotTensor:
    return dataclasses.replace(part, tensor=part.tensor * 1.01)


def gate_for_up(part: SlotTensor) -> SlotTensor:
    other = {"w1": "w3", "w3": "w1", "w2": "w2"}
    return dataclasses.replace(part, shard=other[part.shard])


def swapped_down(part: SlotTensor) -> SlotTensor:
    """The parts of w2 in the other one of two slots; gate and up stay."""
    return dataclasses.replace(part, slot=2 * E + 1 - part.slot) if part.shard == "w2" else part


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("weight", FAMILY)
def test_fused_equals_unfused(weight: str, slots: int) -> None:
    layer = Layer(FAMILY[weight], slots)
    torch.testing.assert_close(layer.fused(), layer.unfused(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("change", [off_by_1_percent, gate_for_up])
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("weight", FAMILY)
def test_control_wrong_slots_differ(weight: str, slots: int, change: Change) -> None:
    layer = Layer(FAMILY[weight], slots)
    assert (layer.fused(change) - layer.unfused()).abs().max() > 1e-3


@pytest.mark.parametrize("weight", FAMILY)
def test_control_the_parts_of_a_slot_belong_together(weight: str) -> None:
    layer = Layer(FAMILY[weight], 2)
    assert (layer.fused(swapped_down) - layer.unfused()).abs().max() > 1e-3


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("weight", FAMILY)
def test_control_slots_share_one_weight_and_do_not_split_it(weight: str, slots: int) -> None:
    layer = Layer(FAMILY[weight], slots)
    wrong_weight = 1 / slots if slots > 1 else 1 / 2.5
    assert (layer.fused(slot_weight=wrong_weight) - layer.unfused()).abs().max() > 1e-3


def test_control_an_unwritten_slot_shows() -> None:
    layer = Layer(FAMILY["constant"], 2)

    def lost(part: SlotTensor) -> SlotTensor:
        return dataclasses.replace(part, slot=E)

    assert layer.fused(lost).isnan().any()
