"""The weight stream: what becomes slots, what passes, and that nothing is lost, in any order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fse_patch.errors import AuditError
from fse_patch.fusion_core.checkpoint.families import FamilySpec, Role, family_of
from fse_patch.fusion_core.checkpoint.naming import TensorNaming
from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.weights import remap
from fse_patch.fusion_core.weights.remap import Remap, SlotTensor, split

H, I, E = 6, 4, 3  # noqa: E741
LAYERS = 2
Tensors = dict[str, torch.Tensor]
# Family, prefix of its main layers, prefix of its draft layer 0 or the one after the main layers.
FAMILIES = [
    ("qwen2_moe", "model.layers.", None),
    ("qwen3_next", "model.layers.", "mtp.layers.0"),
    ("qwen3_5_moe", "model.language_model.layers.", "mtp.layers.0"),
    ("qwen3_5_moe_text", "model.layers.", "mtp.layers.0"),
    ("glm4_moe", "model.layers.", f"model.layers.{LAYERS}"),
]
with_draft = pytest.mark.parametrize(("name", "prefix", "draft"), FAMILIES[1:], ids=lambda v: str(v))


def family(name: str) -> FamilySpec:
    found = family_of(name)
    assert found is not None
    return found


def mlp_tensors(prefix: str, shared: str, slots: int, stacked: bool) -> Tensors:
    """The tensors of one MoE block with distinct values; ``prefix`` ends in a dot."""
    owners = {f"{shared}.": slots * I} | ({} if stacked else {f"experts.{e}.": I for e in range(E)})
    shapes = {
        f"{owner}{projection}.weight": (width, H) if projection != "down_proj" else (H, width)
        for owner, width in owners.items()
        for projection in ("gate_proj", "up_proj", "down_proj")
    }
    if stacked:
        shapes |= {"experts.gate_up_proj": (E, 2 * I, H), "experts.down_proj": (E, H, I)}
    shapes |= {"gate.weight": (E, H), "gate.e_score_correction_bias": (E,)}
    if shared == "shared_expert":
        shapes["shared_expert_gate.weight"] = (1, H)
    return {f"{prefix}{name}": torch.randn(*shape) for name, shape in shapes.items()}


def checkpoint(name: str, slots: int = 1, stacked: bool = False) -> Tensors:
    """All tensors of a tiny model of a family, draft included."""
    torch.manual_seed(0)
    shared = family(name).shared_module
    prefix, draft = next((p, d) for n, p, d in FAMILIES if n == name)
    tensors = {"lm_head.weight": torch.randn(4, H)}
    for layer in range(LAYERS):
        tensors |= mlp_tensors(f"{prefix}{layer}.mlp.", shared, slots, stacked)
        tensors[f"{prefix}{layer}.input_layernorm.weight"] = torch.randn(H)
    if draft:
        tensors |= mlp_tensors(f"{draft}.mlp.", shared, slots, stacked)
    return tensors


def remapper(
    name: str, slots: int = 1, role: Role = "main", layers: tuple[int, ...] = tuple(range(LAYERS))
) -> Remap:
    return Remap(ExpertLayout(E, slots, 2, H, I), role, TensorNaming(family(name), LAYERS), layers)


def run(
    remap: Remap, tensors: Mapping[str, torch.Tensor]
) -> tuple[Tensors, dict[tuple[int, int, str], SlotTensor]]:
    """What passed, and the slot tensors by layer, slot and parameter shard; no key comes twice."""
    passed: Tensors = {}
    parts: dict[tuple[int, int, str], SlotTensor] = {}
    for item in remap(tensors.items()):
        if isinstance(item, SlotTensor):
            key = (item.layer, item.slot, f"{item.shard}_{item.suffix}")
            assert key not in parts
            parts[key] = item
        else:
            assert item[0] not in passed
            passed[item[0]] = item[1]
    return passed, parts


def wrong(
    tensors: Tensors, prefixes: Mapping[int, str], shared: str, slots: int, passed: Tensors, parts: Mapping
) -> list[str]:
    """In what the output differs from the definition; ``prefixes`` of the layers to remap."""
    found, mine = [], {}
    for layer, prefix in prefixes.items():
        for projection, shard in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            name = f"{prefix}{shared}.{projection}.weight"
            mine[name] = tensors[name]
            for j in range(slots):
                part = parts.get((layer, E + j, f"{shard}_weight"))
                whole = tensors[name]
                rows = slice(j * I, (j + 1) * I)
                expected = whole[:, rows] if shard == "w2" else whole[rows]
                if part is None or not torch.equal(part.tensor, expected):
                    found.append(f"{name}, slot {j}")
    if len(parts) != 3 * slots * len(prefixes):
        found.append(f"{len(parts)} slot tensors")
    rest = [n for n in tensors if n not in mine]
    if sorted(passed) != sorted(rest) or any(passed[n] is not tensors[n] for n in passed if n in tensors):
        found.append("what passes is not what came in")
    return found


@pytest.mark.parametrize("name", [n for n, *_ in FAMILIES])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_order_gives_the_same(name: str, data: st.DataObject) -> None:
    slots, stacked = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.booleans())
    tensors = checkpoint(name, slots, stacked)
    order = data.draw(st.permutations(list(tensors)))
    stream = remapper(name, slots)
    passed, parts = run(stream, {n: tensors[n] for n in order})
    prefix = next(p for n, p, _ in FAMILIES if n == name)
    prefixes = {layer: f"{prefix}{layer}.mlp." for layer in range(LAYERS)}
    assert wrong(tensors, prefixes, family(name).shared_module, slots, passed, parts) == []
    assert list(passed) == [n for n in order if n in passed]
    assert stream.read == len(tensors) == stream.passed + stream.shared
    assert stream.emitted == 3 * slots * LAYERS


@with_draft
def test_the_draft_gets_its_own_tensors_and_no_others(name: str, prefix: str, draft: str) -> None:
    tensors = checkpoint(name, 2)
    layer = int(draft.rpartition(".")[2])
    passed, parts = run(remapper(name, 2, "draft", (layer,)), tensors)
    assert wrong(tensors, {layer: f"{draft}.mlp."}, family(name).shared_module, 2, passed, parts) == []
    main_passed, _ = run(remapper(name, 2, "main", tuple({0, layer})), tensors)
    assert f"{draft}.mlp.{family(name).shared_module}.up_proj.weight" in main_passed
    assert f"{prefix}0.mlp.{family(name).shared_module}.up_proj.weight" in passed


def test_layers_of_another_process_pass() -> None:
    tensors = checkpoint("qwen2_moe")
    passed, parts = run(remapper("qwen2_moe", layers=(1,)), tensors)
    assert wrong(tensors, {1: "model.layers.1.mlp."}, "shared_expert", 1, passed, parts) == []
    assert "model.layers.0.mlp.shared_expert.up_proj.weight" in passed


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.shared_expert_gate.weight",
        "model.layers.0.mlp.shared_experts.gate_proj.weight",
        "model.layers.0.mlp.shared_expert.act.weight",
        "model.layers.0.mlp.shared_expertxgate_proj.weight",
        "model.layers.0.mlp.experts.0.shared_expert.gate_proj.weight",
        "other.model.layers.0.mlp.shared_expert.gate_proj.weight",
        "model.layers.0.self_attn.shared_expert.gate_proj.weight",
        "model.layers.7.mlp.shared_expert.gate_proj.weight",
        "mtp.layers.0.mlp.shared_expert.gate_proj.weight",
    ],
)
def test_what_only_resembles_a_shared_expert_passes(name: str) -> None:
    tensor = torch.zeros(1, H)
    passed, parts = run(remapper("qwen3_next"), {name: tensor})
    assert passed[name] is tensor
    assert not parts


def test_control_the_real_name_does_not_pass() -> None:
    passed, parts = run(
        remapper("qwen3_next"), {"model.layers.0.mlp.shared_expert.gate_proj.weight": torch.zeros(I, H)}
    )
    assert not passed
    assert list(parts) == [(0, E, "w1_weight")]


def test_control_a_wrong_slice_is_seen() -> None:
    tensors = checkpoint("qwen2_moe", 2)
    prefixes = {layer: f"model.layers.{layer}.mlp." for layer in range(LAYERS)}
    with patch.object(remap, "split", lambda t, p, layout: split(t, p, layout)[::-1]):
        passed, parts = run(remapper("qwen2_moe", 2), tensors)
    assert len(wrong(tensors, prefixes, "shared_expert", 2, passed, parts)) == 2 * 3 * LAYERS
    copied = {n: t.clone() for n, t in passed.items()}
    assert "what passes is not what came in" in wrong(tensors, prefixes, "shared_expert", 2, copied, parts)


def test_one_tensor_at_a_time() -> None:
    pulled: list[str] = []

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in checkpoint("glm4_moe", 2).items():
            pulled.append(name)
            yield name, tensor

    for number, item in enumerate(remapper("glm4_moe", 2)(stream()), start=1):
        ahead = 0 if not isinstance(item, SlotTensor) else 1
        assert len(pulled) <= number + ahead
    assert len(pulled) == len(checkpoint("glm4_moe", 2))


@pytest.mark.parametrize("again", ["same", "other prefix"])
def test_a_shared_tensor_that_comes_twice_is_refused(again: str) -> None:
    name = "model.layers.0.mlp.shared_expert.gate_proj.weight"
    twin = name if again == "same" else name.replace("model.", "model.language_model.", 1)
    with pytest.raises(AuditError, match=r"gate_proj.*twice"):
        list(remapper("qwen3_5_moe")([(name, torch.zeros(I, H)), (twin, torch.zeros(I, H))]))


def test_other_tensors_may_come_twice() -> None:
    pair = ("model.layers.0.mlp.experts.0.gate_proj.weight", torch.zeros(I, H))
    assert list(remapper("qwen3_next")([pair, pair])) == [pair, pair]


def test_a_second_load_may_bring_them_again() -> None:
    tensors = checkpoint("qwen2_moe")
    stream = remapper("qwen2_moe")
    assert len(run(stream, tensors)[1]) == len(run(stream, tensors)[1]) == 3 * LAYERS


@pytest.mark.parametrize("slots", [1, 2])
def test_a_merged_shared_projection_is_cut_into_gate_and_up(slots: int) -> None:
    tensors = checkpoint("qwen2_moe", slots)
    expected = run(remapper("qwen2_moe", slots), tensors)[1]
    together: Tensors = {}
    for name, tensor in tensors.items():
        if ".shared_expert.gate_proj" in name:
            up = tensors[name.replace("gate_proj", "up_proj")]
            together[name.replace("gate_proj", "gate_up_proj")] = torch.cat([tensor, up])
        elif ".shared_expert.up_proj" not in name:
            together[name] = tensor
    parts = run(remapper("qwen2_moe", slots), together)[1]
    assert parts.keys() == expected.keys()
    assert all(torch.equal(parts[key].tensor, other.tensor) for key, other in expected.items())


@pytest.mark.parametrize(
    ("suffix", "tensor"),
    [
        ("weight", torch.zeros(2 * I + 1, H)),
        ("weight", torch.zeros(2 * I)),
        ("weight_scale", torch.zeros(2 * I, 1)),
    ],
)
def test_other_merged_tensors_are_refused(suffix: str, tensor: torch.Tensor) -> None:
    name = f"model.layers.0.mlp.shared_expert.gate_up_proj.{suffix}"
    with pytest.raises(AuditError, match="are not cut apart"):
        list(remapper("qwen2_moe")([(name, tensor)]))


def test_losing_a_slot_tensor_is_seen() -> None:
    honest = Remap._slots

    def lossy(self: Remap, *args: object) -> Iterator[SlotTensor]:
        parts = list(honest(self, *args))  # type: ignore[arg-type]
        self.emitted -= 1
        return iter(parts[1:])

    with patch.object(Remap, "_slots", lossy), pytest.raises(AuditError, match="weights were lost"):
        run(remapper("qwen2_moe", 2), checkpoint("qwen2_moe", 2))
    with patch.object(remap, "split", lambda *a: split(*a)[1:]), pytest.raises(ValueError, match="zip"):
        run(remapper("qwen2_moe", 2), checkpoint("qwen2_moe", 2))
