"""The canary's reference against the families' definitions in plain Python floats, and what it can tell."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fse_patch.errors import AuditError, FsePatchError
from fse_patch.fusion_core.checkpoint.families import family_of
from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.decision.outcome import Merged, RoutingSpec
from fse_patch.fusion_core.proof.canary import (
    CanaryError,
    CheckpointLayer,
    NoReference,
    _clear_tokens,
    choose,
    deviation,
    judge,
    reference,
)
from fse_patch.fusion_core.proof.rounding import Served

from .checkpoints import tensors_of
from .moe import choose as choose_in_floats
from .moe import decision, moe_spec, naming_of, shared_weight
from .safetensors import save

F32 = Served(torch.float32, torch.float32, torch.float32, torch.float32)
SOFTMAX = RoutingSpec("softmax", False)
GROUPED = RoutingSpec("sigmoid", True, 2.5, 4, 2, True)
# Family, layout (E, S, k, H, I), routing, one tensor for all routed experts.
LAYERS: dict[str, tuple[str, ExpertLayout, RoutingSpec, bool]] = {
    "softmax": ("qwen2_moe", ExpertLayout(8, 4, 2, 16, 6), SOFTMAX, False),
    "softmax renormalised": ("qwen2_moe", ExpertLayout(8, 1, 3, 16, 8), RoutingSpec("softmax", True), False),
    "stacked": ("qwen3_5_moe_text", ExpertLayout(8, 1, 2, 16, 8), RoutingSpec("softmax", True), True),
    "grouped with bias": ("glm4_moe", ExpertLayout(16, 2, 3, 16, 8), GROUPED, False),
    "every expert": ("qwen2_moe", ExpertLayout(4, 1, 4, 16, 8), RoutingSpec("softmax", True), False),
}


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[Merged, dict[str, torch.Tensor]]:
    """A decision and the tensors of layer 1."""
    model_type, layout, routing, stacked = LAYERS[name]
    family = family_of(model_type)
    assert family is not None
    made = decision(layout, routing, family.shared_weight, layers=(1,), model_type=model_type)
    draw = torch.Generator().manual_seed(7)

    def tensor(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=draw) / math.sqrt(shape[-1])).to(dtype)

    hidden, inner, shared = layout.hidden_size, layout.moe_intermediate_size, layout.shared_intermediate_size
    mlp = "model.layers.1.mlp."
    tensors = {f"{mlp}gate.weight": 4 * tensor(layout.num_routed, hidden)}
    if routing.has_correction_bias:
        tensors[f"{mlp}gate.e_score_correction_bias"] = tensor(layout.num_routed).float()
    if family.shared_weight == "sigmoid_gate":
        tensors[f"{mlp}shared_expert_gate.weight"] = tensor(1, hidden)
    widths = {f"{mlp}{family.shared_module}.": shared}
    if stacked:
        tensors[f"{mlp}experts.gate_up_proj"] = tensor(layout.num_routed, 2 * inner, hidden)
        tensors[f"{mlp}experts.down_proj"] = tensor(layout.num_routed, hidden, inner)
    else:
        widths |= {f"{mlp}experts.{e}.": inner for e in range(layout.num_routed)}
    for owner, width in widths.items():
        tensors[f"{owner}gate_proj.weight"] = tensor(width, hidden)
        tensors[f"{owner}up_proj.weight"] = tensor(width, hidden)
        tensors[f"{owner}down_proj.weight"] = tensor(hidden, width)
    return made, tensors


def opened(folder: Path, decision: Merged, tensors: dict[str, torch.Tensor]) -> CheckpointLayer:
    save(folder / "model.safetensors", tensors)
    naming = naming_of(decision.model_type, 2)
    return CheckpointLayer(tensors_of(folder), naming, decision.role, decision.quant_method, 1)


def mlp_in_floats(x: list[float], gate: Any, up: Any, down: Any) -> list[float]:
    def dot(row: list[float], vector: list[float]) -> float:
        return math.fsum(a * b for a, b in zip(row, vector, strict=True))

    inner = []
    for g, u in zip(gate.tolist(), up.tolist(), strict=True):
        pre = dot(g, x)
        inner.append(pre / (1 + math.exp(-pre)) * dot(u, x))
    return [dot(row, inner) for row in down.tolist()]


def layer_in_floats(decision: Merged, tensors: dict[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """The layer by its definition, in plain Python floats."""
    mlp = "model.layers.1.mlp."
    family = family_of(decision.model_type)
    assert family is not None
    gate = tensors[f"{mlp}gate.weight"].double()
    bias = tensors.get(f"{mlp}gate.e_score_correction_bias")
    row = tensors.get(f"{mlp}shared_expert_gate.weight")

    def weights(owner: str) -> list[torch.Tensor]:
        return [tensors[f"{mlp}{owner}.{p}_proj.weight"] for p in ("gate", "up", "down")]

    outputs = []
    for token in hidden.double():
        x = token.tolist()
        scored = (gate @ token).tolist()
        chosen = choose_in_floats(
            scored, decision.moe.layout.top_k, decision.moe.routing, None if bias is None else bias.tolist()
        )
        shared = shared_weight(None if row is None else float(row[0].double() @ token))
        parts = [(shared, mlp_in_floats(x, *weights(family.shared_module)))]
        for expert, weight in chosen.items():
            if f"{mlp}experts.down_proj" in tensors:
                both = tensors[f"{mlp}experts.gate_up_proj"][expert]
                width = both.shape[0] // 2
                held = [both[:width], both[width:], tensors[f"{mlp}experts.down_proj"][expert]]
            else:
                held = weights(f"experts.{expert}")
            parts.append((weight, mlp_in_floats(x, *held)))
        outputs.append([math.fsum(w * y[i] for w, y in parts) for i in range(len(x))])
    return torch.tensor(outputs, dtype=torch.float64)


@pytest.mark.parametrize("name", LAYERS)
def test_the_reference_is_the_definition(tmp_path: Path, name: str) -> None:
    decision, tensors = made(name)
    found = reference(opened(tmp_path, decision, tensors), decision.moe, F32)
    assert len(found.hidden) >= 2
    assert found.output.dtype == torch.float64
    assert deviation(layer_in_floats(decision, tensors, found.hidden), found.output) < 1e-12
    assert found.tolerance == 1e-4


@pytest.mark.parametrize(
    "part", ["gate.weight", "shared_expert.up_proj", "shared_expert_gate", "experts.0.", "experts.7."]
)
def test_every_part_counts(tmp_path: Path, part: str) -> None:
    """The control of the comparison above: another tensor, another answer, and more than is tolerated."""
    decision, tensors = made("softmax")
    found = reference(opened(tmp_path, decision, tensors), decision.moe, F32)
    changed = {n: t * 1.1 if part in n else t for n, t in tensors.items()}
    off = layer_in_floats(decision, changed, found.hidden)
    with pytest.raises(CanaryError, match=r"canary: layer 1 is .* off what the checkpoint says"):
        judge("main", 1, found, off)
    assert judge("main", 1, found, found.output.float()) < 1e-6


def test_rounding_is_tolerated_and_little_more(tmp_path: Path) -> None:
    decision, tensors = made("softmax renormalised", torch.bfloat16)
    served = Served(*[torch.bfloat16] * 4)
    found = reference(opened(tmp_path, decision, tensors), decision.moe, served)
    assert 4 * 2**-8 <= found.tolerance < 0.1
    assert found.hidden.dtype == torch.bfloat16
    judge("main", 1, found, found.output.bfloat16())
    with pytest.raises(CanaryError):
        judge("main", 1, found, found.output * 1.1)


def test_a_gpu_may_multiply_float32_in_tf32() -> None:
    assert Served(*[torch.float32] * 4, device="cuda").unit == 2**-11  # type: ignore[misc]
    assert F32.unit == 2**-24


def test_what_is_no_number_fails(tmp_path: Path) -> None:
    decision, tensors = made("softmax")
    found = reference(opened(tmp_path, decision, tensors), decision.moe, F32)
    broken = found.output.clone()
    broken[0, 0] = float("nan")
    assert deviation(broken, found.output) == float("inf")
    for output in (broken, found.output[:1]):
        with pytest.raises(AuditError):
            judge("main", 1, found, output)


def test_near_ties_are_not_drawn() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 1.0 - 1e-9], [4.0, 3.0, 2.0, 1.0]], dtype=torch.float64)
    _, margin = choose(logits, 3, SOFTMAX, None)
    assert margin[0] < 1e-8
    assert margin[1] == 1
    # Between the groups: {0.9, 0.1} beats {0.8, 0.2} by nothing, though the experts differ clearly.
    spec = RoutingSpec("sigmoid", True, 1.0, 2, 1, True)
    scores = torch.tensor([[0.9, 0.1, 0.8, 0.2]], dtype=torch.float64)
    _, margin = choose(torch.logit(scores), 1, spec, torch.zeros(4, dtype=torch.float64))
    assert margin[0] < 1e-12


def test_a_router_that_sees_no_difference_has_no_reference(tmp_path: Path) -> None:
    decision, tensors = made("softmax")
    tensors["model.layers.1.mlp.gate.weight"] *= 0
    with pytest.raises(NoReference, match="no random token"):
        reference(opened(tmp_path, decision, tensors), decision.moe, F32)


def test_glm_of_its_published_size_has_clear_tokens() -> None:
    """GLM-4.5-Air, its gate in float32: what is compared are sigmoids, which errors of logits shrink in."""
    layout = ExpertLayout(128, 1, 8, 4096, 1408)
    routing = RoutingSpec("sigmoid", True, 1.0, has_correction_bias=True)
    moe = moe_spec(layout, routing, "constant", layers=(1,))
    draw = torch.Generator().manual_seed(3)
    gate = (0.03 * torch.randn(128, 4096, generator=draw)).double()
    bias = (0.05 * torch.randn(128, generator=draw)).double()
    served = Served(torch.bfloat16, torch.float32, torch.float32, torch.bfloat16, "cuda")
    tokens, chosen = _clear_tokens(gate, bias, moe, served, 0, None)
    assert chosen.shape == (len(tokens), 8)
    # Errors as large as the roundings of that gate leave the choice as it is.
    logits = tokens.double() @ gate.T
    noise = torch.randn(logits.shape, generator=draw, dtype=torch.float64).clamp(-2, 2) * served.gate_unit
    size = logits.abs().amax(1, keepdim=True)

    def chosen_with(times: float) -> torch.Tensor:
        return choose(logits + times * noise * size, 8, routing, bias)[0].sort().values

    assert torch.equal(chosen_with(1), chosen.sort().values)
    # The control: larger errors do not.
    assert not torch.equal(chosen_with(100), chosen.sort().values)


@pytest.mark.parametrize("what", ["scales", "8 bit", "layer"])
def test_what_is_not_plain_weights_has_no_reference(tmp_path: Path, what: str) -> None:
    decision, tensors = made("softmax")
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    if what == "scales":
        tensors[f"{name}_scale"] = torch.ones(1)
    elif what == "8 bit":
        tensors = {n: t.to(torch.float8_e4m3fn) if "experts" in n else t for n, t in tensors.items()}
    else:
        tensors = {n.replace("layers.1.", "layers.0."): t for n, t in tensors.items()}
    with pytest.raises(NoReference):
        reference(opened(tmp_path, decision, tensors), decision.moe, F32)


def test_tensors_are_read_where_the_headers_say(tmp_path: Path) -> None:
    first, second = torch.arange(6.0).reshape(3, 2), torch.arange(4.0).to(torch.bfloat16)
    save(tmp_path / "a.safetensors", {"first": first})
    save(tmp_path / "b.safetensors", {"second": second})
    held = tensors_of(tmp_path)
    assert sorted(held.names()) == ["first", "second"]
    assert torch.equal(held.read("first", 1), first[1])
    assert torch.equal(held.read("second"), second)
    # An index chooses the files; where it says that a tensor lies is nobody's business.
    index = {"weight_map": {"first": "b.safetensors", "second": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(tensors_of(tmp_path).read("first", 1), first[1])
    index = {"weight_map": {"second": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert tensors_of(tmp_path).names() == ["first"]


def test_a_file_that_ends_too_early_is_an_error(tmp_path: Path) -> None:
    save(tmp_path / "a.safetensors", {"first": torch.ones(8)})
    held = tensors_of(tmp_path)
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-4])
    with pytest.raises(FsePatchError, match="cannot be read"):
        held.read("first")
