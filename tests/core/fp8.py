"""FP8 layers for tests: checkpoints of every way to scale, and what engines make of them, in torch.

The forward is written from the engines' kernels: activations and weights are multiplied as e4m3 numbers,
summed in float32 and scaled; every result that they store is bfloat16.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fse_patch.fusion_core.checkpoint.families import family_of
from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.decision.outcome import Merged, RoutingSpec
from fse_patch.fusion_core.proof.canary import Reference, reference
from fse_patch.fusion_core.proof.checkpoint_layer import CheckpointLayer
from fse_patch.fusion_core.proof.rounding import Served
from fse_patch.fusion_core.weights.remap import Remap, SlotTensor

from .checkpoints import tensors_of
from .moe import decision, naming_of, router_of
from .safetensors import save

Tensors = dict[str, torch.Tensor]
MLP = "model.layers.1.mlp."
BF16 = Served(*[torch.bfloat16] * 4)
E4M3 = torch.float8_e4m3fn
SHARDS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@dataclass(frozen=True)
class Scheme:
    """A way to store FP8 weights.

    Args:
        config: of `quantization_config`.
        group: rows and columns of a weight that share a scale; 0 for all.
        shape: of one scale for all of a weight: [] or [1]; of one for a row: [-1] or [-1, 1].
        inputs: tokens and columns of activations that share a scale; None where they are not rounded.
        static: activations have a scale in the checkpoint.
    """

    config: dict[str, Any]
    group: tuple[int, int]
    name: str = "weight_scale"
    shape: tuple[int, ...] | None = None
    inputs: tuple[int, int] | None = (1, 0)
    static: bool = False


def ct(strategy: str, activations: dict[str, Any] | None, **weights: Any) -> dict[str, Any]:
    """A compressed-tensors config."""
    scheme = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, **weights}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": scheme}
    if activations is not None:
        group["input_activations"] = {"num_bits": 8, "type": "float", **activations}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
    }


BLOCK = 32
_DYNAMIC = {"quant_method": "fp8", "activation_scheme": "dynamic"}
_BLOCKS = {**_DYNAMIC, "weight_block_size": [BLOCK, BLOCK]}
_BY_TOKEN = {"strategy": "token", "dynamic": True}
SCHEMES = {
    "block": Scheme(_BLOCKS, (BLOCK, BLOCK), "weight_scale_inv", inputs=(1, BLOCK)),
    "block by compressed-tensors": Scheme(
        ct("block", {"strategy": "group", "group_size": BLOCK, "dynamic": True}, block_structure=[BLOCK] * 2),
        (BLOCK, BLOCK),
        inputs=(1, BLOCK),
    ),
    "tensor": Scheme(_DYNAMIC, (0, 0), shape=(), inputs=(0, 0)),
    "tensor, static": Scheme(
        {"quant_method": "fp8", "activation_scheme": "static"}, (0, 0), "weight_scale", (1,), (0, 0), True
    ),
    "tensor by compressed-tensors": Scheme(
        ct("tensor", {"strategy": "tensor", "dynamic": False}), (0, 0), "weight_scale", (1,), (0, 0), True
    ),
    "channel": Scheme(ct("channel", _BY_TOKEN), (1, 0), shape=(-1, 1)),
    "channel by fbgemm": Scheme({"quant_method": "fbgemm_fp8"}, (1, 0), shape=(-1,)),
    "channel, weights only": Scheme(ct("channel", None), (1, 0), shape=(-1, 1), inputs=None),
}


def expand(scale: torch.Tensor, group: tuple[int, int], out: int, inner: int) -> torch.Tensor:
    """A factor for every element of a weight [out, inner]."""
    rows, columns = group[0] or out, group[1] or inner
    wide = scale.reshape(-(-out // rows), -(-inner // columns)).repeat_interleave(rows, 0)[:out]
    return wide.repeat_interleave(columns, 1)[:, :inner]


def quantise(weight: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight in e4m3, and its scales as a matrix."""
    (out, inner), (rows, columns) = weight.shape, scheme.group
    rows, columns = rows or out, columns or inner
    scale = torch.stack(
        [
            torch.stack([part.abs().max() / 448 for part in band.split(columns, dim=1)])
            for band in weight.split(rows)
        ]
    )
    return (weight / expand(scale, scheme.group, out, inner)).to(E4M3), scale


def calibrated(
    owner: str, weights: list[torch.Tensor], scheme: Scheme, held: Tensors, draw: torch.Generator
) -> Tensors:
    """The input scales of an expert, as 64 random tokens show them."""
    gate, up, _ = (
        w.float() * expand(held[f"{MLP}{owner}.{p}.{scheme.name}"], scheme.group, *w.shape)
        for p, w in zip(SHARDS, weights, strict=True)
    )
    x = torch.randn(64, gate.shape[1], generator=draw)
    inner = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    before, between = ((t.abs().max() / 448).reshape(1) for t in (x, inner))
    names = [f"{MLP}{owner}.{p}.input_scale" for p in SHARDS]
    return dict(zip(names, (before, before, between), strict=True))


def stored(made: Merged, scheme: Scheme, seed: int) -> Tensors:
    """The tensors of layer 1. Experts and blocks differ in size, so that their scales do too."""
    layout, family = made.moe.layout, family_of(made.model_type)
    assert family is not None
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) / math.sqrt(shape[-1])

    hidden, width = layout.hidden_size, layout.moe_intermediate_size
    held = {f"{MLP}gate.weight": 4 * randn(layout.num_routed, hidden).bfloat16()}
    if made.moe.routing.has_correction_bias:
        held[f"{MLP}gate.e_score_correction_bias"] = randn(layout.num_routed)
    if made.moe.shared_weight == "sigmoid_gate":
        held[f"{MLP}shared_expert_gate.weight"] = randn(1, hidden).bfloat16()
    owners = {f"experts.{e}": width for e in range(layout.num_routed)}
    for owner, size in {**owners, family.shared_module: layout.shared_intermediate_size}.items():
        for projection in SHARDS:
            shape = (hidden, size) if projection == "down_proj" else (size, hidden)
            spread = 2 * torch.rand(-(-shape[0] // BLOCK), -(-shape[1] // BLOCK), generator=draw) + 0.5
            factor = expand(spread, (BLOCK, BLOCK), *shape) * (1 + 2 * torch.rand(1, generator=draw))
            weight, scale = quantise(randn(*shape) * factor, scheme)
            name = f"{MLP}{owner}.{projection}."
            held[f"{name}weight"] = weight
            held[f"{name}{scheme.name}"] = scale if scheme.shape is None else scale.reshape(scheme.shape)
        if scheme.static:
            held |= calibrated(owner, [held[f"{MLP}{owner}.{p}.weight"] for p in SHARDS], scheme, held, draw)
    return held


def layer(scheme: str, layout: ExpertLayout, routing: RoutingSpec | None = None) -> Merged:
    """A decision to fuse layer 1 of a checkpoint of ``scheme``; GLM's where scores are sigmoids."""
    name = "glm4_moe" if routing is not None and routing.scoring == "sigmoid" else "qwen2_moe"
    family = family_of(name)
    assert family is not None
    made = decision(layout, routing, family.shared_weight, layers=(1,), model_type=name)
    return replace(made, quant_method=SCHEMES[scheme].config["quant_method"].replace("_", "-"))


def opened(folder: Path, made: Merged, scheme: str, tensors: Tensors) -> CheckpointLayer:
    """The layer as the canary reads it from a folder."""
    save(folder / "model.safetensors", tensors)
    config = {"model_type": made.model_type, "quantization_config": SCHEMES[scheme].config}
    (folder / "config.json").write_text(json.dumps(config))
    return CheckpointLayer(tensors_of(folder), naming_of(made.model_type, 2), made.role, made.quant_method, 1)


def wanted(folder: Path, made: Merged, scheme: str, tensors: Tensors, seed: int = 0) -> Reference:
    """What the canary expects of the layer."""
    return reference(opened(folder, made, scheme, tensors), made.moe, BF16, seed)


class Kernel:
    """A fused layer as an engine holds it, and its forward.

    Args:
        power_of_two: scales of activations are rounded up to powers of two (UE8M0).
        weight_only: activations stay bfloat16, as on devices without FP8.
        parts: processes that share each expert, and find scales for their own columns of it.
    """

    def __init__(
        self,
        made: Merged,
        scheme: str,
        tensors: Tensors,
        power_of_two: bool = False,
        weight_only: bool = False,
        parts: int = 1,
    ) -> None:
        self.moe, self.layout, self.tensors, self.scheme = made.moe, made.moe.layout, tensors, SCHEMES[scheme]
        self.power_of_two, self.weight_only, self.parts = power_of_two, weight_only, parts
        # Factor on the weights of the shared slots, and what is done to those of the routed experts.
        self.slot_factor = 1.0
        self.weights_in_powers_of_two = False
        self.weighed: Callable[[torch.Tensor], torch.Tensor] = lambda weights: weights
        # (slot, shard, suffix) -> tensor.
        self.held: dict[tuple[int, str, str], torch.Tensor] = {}
        naming = naming_of(made.model_type, 2)
        for item in Remap(self.layout, made.role, naming, [1])(tensors.items()):
            if isinstance(item, SlotTensor):
                self.held[item.slot, item.shard, item.suffix] = item.tensor.clone()
            elif (ref := naming.parse(item[0])) is not None and ref.expert is not None:
                self.held[ref.expert, SHARDS[ref.projection], ref.suffix] = item[1].clone()

    def weight(self, slot: int, shard: str) -> torch.Tensor:
        weight = self.held[slot, shard, "weight"]
        scale = self.held[slot, shard, self.scheme.name]
        factors = expand(scale, self.scheme.group, *weight.shape)
        whole = weight.float() * factors
        if self.weights_in_powers_of_two:
            factors = torch.exp2(torch.ceil(torch.log2(factors)))
            whole = (whole / factors).to(E4M3).float() * factors
        both = [self.held[slot, s, self.scheme.name] for s in ("w1", "w3")]
        if self.scheme.group == (0, 0) and shard != "w2":
            # Kernels with one scale for both quantise again, by the larger one.
            largest = torch.maximum(both[0].max(), both[1].max())
            whole = (whole / largest).clamp(-448, 448).to(E4M3).float() * largest
        return whole.bfloat16().float() if self.weight_only else whole

    def quantised(self, rows: torch.Tensor, shards: tuple[str, ...]) -> torch.Tensor:
        """Rows in bfloat16 as the kernel multiplies them."""
        if self.scheme.inputs is None or self.weight_only:
            return rows.float()
        tokens, columns = self.scheme.inputs
        parts = []
        for part in rows.float().split(columns or rows.shape[1], 1):
            largest = part.abs().amax(dim=1, keepdim=True)
            scales = (largest if tokens else largest.max().expand_as(largest)).clamp_min(1e-10) / 448
            if self.scheme.static:
                stored = [t for (_, s, x), t in self.held.items() if x == "input_scale" and s in shards]
                scales = torch.full_like(scales, max(map(float, stored)))
            elif self.power_of_two:
                scales = torch.exp2(torch.ceil(torch.log2(scales)))
            parts.append((part * (1 / scales)).clamp(-448, 448).to(E4M3).float() * scales)
        return torch.cat(parts, dim=1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, H] bfloat16 to the same."""
        router = router_of(self.moe, self.tensors, MLP, 1)
        weights, ids = router(hidden, hidden @ self.tensors[f"{MLP}gate.weight"].T)
        k = self.layout.top_k
        weights = torch.cat([self.weighed(weights[:, :k]), weights[:, k:] * self.slot_factor], dim=1)
        states = self.quantised(hidden, ("w1", "w3"))
        # Each slot once, with the tokens and columns that chose it.
        users = {int(slot): (ids == slot).nonzero(as_tuple=True) for slot in ids.unique()}
        inner = []
        for slot, (tokens, _) in users.items():
            gate, up = ((states[tokens] @ self.weight(slot, s).T).bfloat16().float() for s in ("w1", "w3"))
            inner.append((torch.nn.functional.silu(gate) * up).bfloat16())
        ranks = torch.cat(inner).chunk(self.parts, dim=1)
        rounded = torch.cat([self.quantised(rank, ("w2",)) for rank in ranks], dim=1)
        down = rounded.split([len(part) for part in inner])
        out = torch.zeros(hidden.shape, dtype=torch.float32)
        for (slot, (tokens, columns)), part in zip(users.items(), down, strict=True):
            product = (part @ self.weight(slot, "w2").T) * weights[tokens, columns, None]
            out[tokens] += product.bfloat16().float()
        return out.bfloat16()
