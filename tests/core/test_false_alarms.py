"""No false alarm: drawn layers go the whole way through the core, and every defence lets them pass.

The answer is compared with the layer's definition in plain Python floats, which shares nothing with the core.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fse_patch.errors import AuditError, NoReference
from fse_patch.fusion_core.checkpoint.families import family_of
from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.decision.outcome import Merged, RoutingSpec
from fse_patch.fusion_core.proof.canary import deviation, judge, reference
from fse_patch.fusion_core.proof.rounding import Served
from fse_patch.fusion_core.weights.audit import SlotAudit, is_poisoned, poison
from fse_patch.fusion_core.weights.remap import Remap, SlotTensor
from fse_patch.fusion_core.weights.samples import SlotSample

from .moe import decision, naming_of, router_of
from .test_canary import layer_in_floats, opened

MLP = "model.layers.1.mlp."
F32 = Served(*[torch.float32] * 4)
Tensors = dict[str, torch.Tensor]


@st.composite
def decisions(draw: st.DrawFn) -> Merged:
    """Any sizes and routing of either kind of family."""
    glm = draw(st.booleans())
    groups = draw(st.integers(1, 4)) if glm else 1
    experts = groups * draw(st.integers(2, 5)) if glm else draw(st.integers(1, 20))
    kept = draw(st.integers(1, groups))
    layout = ExpertLayout(
        experts,
        draw(st.integers(1, 6)),
        draw(st.integers(1, min(6, kept * experts // groups))),
        draw(st.sampled_from([4, 6, 10, 16])),
        draw(st.sampled_from([2, 3, 4, 8])),
    )
    spec = RoutingSpec(
        "sigmoid" if glm else "softmax",
        renormalize=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 0.4, 1.8, 2.5, 16.0])),
        num_expert_group=groups,
        topk_group=kept,
        has_correction_bias=glm,
    )
    name = "glm4_moe" if glm else "qwen2_moe"
    family = family_of(name)
    assert family is not None
    return decision(layout, spec, family.shared_weight, layers=(1,), model_type=name)


def checkpoint(made: Merged, seed: int) -> Tensors:
    """The tensors of layer 1, in a drawn order."""
    layout, family = made.moe.layout, family_of(made.model_type)
    assert family is not None
    draw = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) / math.sqrt(shape[-1])

    hidden, width = layout.hidden_size, layout.moe_intermediate_size
    held = {f"{MLP}gate.weight": 4 * tensor(layout.num_routed, hidden)}
    if made.moe.routing.has_correction_bias:
        held[f"{MLP}gate.e_score_correction_bias"] = tensor(layout.num_routed)
    if made.moe.shared_weight == "sigmoid_gate":
        held[f"{MLP}shared_expert_gate.weight"] = tensor(1, hidden)
    owners = {f"experts.{e}": width for e in range(layout.num_routed)}
    for owner, size in {**owners, family.shared_module: layout.shared_intermediate_size}.items():
        held[f"{MLP}{owner}.gate_proj.weight"] = tensor(size, hidden)
        held[f"{MLP}{owner}.up_proj.weight"] = tensor(size, hidden)
        held[f"{MLP}{owner}.down_proj.weight"] = tensor(hidden, size)
    names = list(held)
    random.Random(seed).shuffle(names)
    return {name: held[name] for name in names}


class Layer:
    """A fused layer as an engine holds it, in float32: parameters, loader, and a kernel that loops."""

    def __init__(self, made: Merged, tensors: Tensors) -> None:
        layout = made.moe.layout
        self.moe, self.layout, self.tensors = made.moe, layout, tensors
        self.naming = naming_of(made.model_type, 2)
        width, hidden = layout.moe_intermediate_size, layout.hidden_size
        self.held = {
            "w13_weight": torch.zeros(layout.num_experts, 2 * width, hidden),
            "w2_weight": torch.zeros(layout.num_experts, hidden, width),
        }
        self.audit = SlotAudit("main")
        self.audit.expect(1, layout.shared_slots, {"weight"})
        for parameter in self.held.values():
            poison(parameter[layout.num_routed :])

    def write(self, expert: int, shard: str, tensor: torch.Tensor) -> None:
        width = self.layout.moe_intermediate_size
        place = {"w1": slice(0, width), "w3": slice(width, None), "w2": slice(None)}[shard]
        self.held["w2_weight" if shard == "w2" else "w13_weight"][expert, place] = tensor

    def load(self) -> int:
        """How many values of the slots were compared with the stream."""
        sample = SlotSample(self.layout, "main", self.naming, [1])
        self.audit.begin()
        for item in Remap(self.layout, "main", self.naming, [1])(sample.tap(self._stream())):
            if isinstance(item, SlotTensor):
                self.write(item.slot, item.shard, item.tensor)
                self.audit.wrote(item)
            elif (ref := self.naming.parse(item[0])) is not None and ref.expert is not None:
                shard = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[ref.projection]
                self.write(ref.expert, shard, item[1])
        self.audit.finish([1] if any(map(is_poisoned, self.held.values())) else [])
        return sample.compare(1, self.held, 0).compared

    def _stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.tensors.items()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        router = router_of(self.moe, self.tensors, MLP, 1)
        weights, ids = router(hidden, hidden @ self.tensors[f"{MLP}gate.weight"].T)
        out = torch.zeros_like(hidden)
        for token, (row_weights, row_ids) in enumerate(zip(weights, ids.tolist(), strict=True)):
            for weight, expert in zip(row_weights, row_ids, strict=True):
                gate, up = (self.held["w13_weight"][expert] @ hidden[token]).chunk(2)
                inner = torch.nn.functional.silu(gate) * up
                out[token] += weight * (self.held["w2_weight"][expert] @ inner)
        return out


def go(made: Merged, seed: int) -> bool:
    """The whole way; whether the canary had tokens to judge by."""
    tensors = checkpoint(made, seed)
    layer = Layer(made, tensors)
    assert layer.load() > 0
    assert layer.audit.slots_loaded == layer.layout.num_shared_slots
    with TemporaryDirectory() as folder:
        try:
            wanted = reference(opened(Path(folder), made, tensors), made.moe, F32, seed)
        except NoReference:
            return False
    assert deviation(layer_in_floats(made, tensors, wanted.hidden), wanted.output) < 1e-10
    assert judge("main", 1, wanted, layer.forward(wanted.hidden)) < 2e-5
    return True


def test_nothing_right_is_stopped() -> None:
    judged: set[tuple[object, ...]] = set()

    @settings(max_examples=320, deadline=None, derandomize=True)
    @given(decisions(), st.integers(0, 2**20))
    def draw(made: Merged, seed: int) -> None:
        if go(made, seed):
            judged.add((made.moe.layout, made.moe.routing))

    draw()
    assert len(judged) >= 200


def test_control_a_wrong_layer_is_stopped() -> None:
    """Each part of the way is alive: another scale, another slot, a part that is not written."""
    layout = ExpertLayout(6, 2, 2, 8, 4)
    spec = RoutingSpec("sigmoid", True, 2.5, 2, 1, True)
    made = decision(layout, spec, "constant", layers=(1,), model_type="glm4_moe")
    assert go(made, 0)
    tensors = checkpoint(made, 0)
    other = dataclasses.replace(spec, routed_scaling_factor=1.0)
    wrong = decision(layout, other, "constant", layers=(1,), model_type="glm4_moe")
    layer = Layer(wrong, tensors)
    layer.load()
    with TemporaryDirectory() as folder:
        wanted = reference(opened(Path(folder), made, tensors), made.moe, F32, 0)
    with pytest.raises(AuditError, match="canary: layer 1"):
        judge("main", 1, wanted, layer.forward(wanted.hidden))
    layer = Layer(made, {n: t for n, t in tensors.items() if "shared_experts.up_proj" not in n})
    with pytest.raises(AuditError, match="never written"):
        layer.load()
