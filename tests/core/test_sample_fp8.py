"""Samples of FP8 slots: bytes and scales bit for bit, each rank its part; other layouts are not judged."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fse_patch.errors import AuditError
from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.weights.samples import VALUES, Comparison, SlotSample

from .fp8 import BLOCK, E4M3, MLP, SCHEMES, Tensors, layer, stored
from .moe import naming_of

E, S, H, I = 4, 2, 96, 64  # noqa: E741
LAYOUT = ExpertLayout(E, S, 2, H, I)
# A width and a hidden size that end within a block.
RAGGED = ExpertLayout(E, 1, 2, 80, 48)


def shared(tensors: Tensors, projection: str, suffix: str) -> torch.Tensor:
    return tensors[f"{MLP}shared_expert.{projection}.{suffix}"]


def cut(tensor: torch.Tensor, axis: int, slot: int, rank: int, cuts: tuple[int, int]) -> torch.Tensor:
    """A rank's part of a slot's part, of what has an extent along ``axis``."""
    if tensor.ndim <= axis or tensor.shape[axis] == 1:
        return tensor
    slots, parts = cuts
    return tensor.chunk(slots, axis)[slot].chunk(parts, axis)[rank]


def loaded(tensors: Tensors, scheme: str, layout: ExpertLayout, parts: int = 1, rank: int = 0) -> Tensors:
    """The fused parameters of one process as engines allocate and fill them, written here by hand."""
    how, held = SCHEMES[scheme], layout.moe_intermediate_size // parts
    suffixes = ["weight", how.name, *(["input_scale"] if how.static else [])]
    rows: dict[str, list[torch.Tensor]] = {}
    for slot in range(layout.num_shared_slots):
        cuts = (layout.num_shared_slots, parts)
        for suffix in suffixes:
            gate, up = (
                cut(shared(tensors, p, suffix), 0, slot, rank, cuts).float() for p in ("gate_proj", "up_proj")
            )
            down = cut(shared(tensors, "down_proj", suffix), 1, slot, rank, cuts).float()
            if suffix == "input_scale":
                w13, w2 = gate.reshape(()), down.reshape(())
            elif how.group == (0, 0) and suffix != "weight":
                w13, w2 = torch.stack([gate.reshape(()), up.reshape(())]), down.reshape(())
            elif how.group == (1, 0) and suffix != "weight":
                w13, w2 = torch.cat([gate.reshape(-1, 1), up.reshape(-1, 1)]), down.reshape(-1, 1)
            else:
                w13, w2 = torch.cat([gate, up]), down
            rows.setdefault(f"w13_{suffix}", []).append(w13)
            rows.setdefault(f"w2_{suffix}", []).append(w2)
    found = {}
    for name, slots in rows.items():
        # Routed experts keep what an allocation has.
        whole = torch.cat([torch.ones(layout.num_routed, *slots[0].shape), torch.stack(slots)])
        found[name] = whole.to(E4M3) if name.endswith("_weight") else whole
    assert found["w2_weight"].shape == (layout.num_experts, layout.hidden_size, held)
    return found


def compared(tensors: Tensors, slots: Tensors, layout: ExpertLayout, rank: int = 0) -> Comparison:
    sample = SlotSample(layout, "main", naming_of("qwen2_moe", 2), [1])
    assert len(list(sample.tap(tensors.items()))) == len(tensors)
    return sample.compare(1, slots, rank)


def scales(tensors: Tensors) -> int:
    """How many scales there are, each as often as slots hold it."""
    names = [n for n in tensors if "shared_expert." in n and n.endswith(("scale", "scale_inv"))]
    alike = sum(
        tensors[n].numel()
        for n in names
        if tensors[n].numel() == 1 or ("down_proj" in n and tensors[n].numel() == H)
    )
    return sum(tensors[n].numel() for n in names) + (S - 1) * alike


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_was_loaded_rightly_is_found(scheme: str) -> None:
    tensors = stored(layer(scheme, LAYOUT), SCHEMES[scheme], 0)
    found = compared(tensors, loaded(tensors, scheme, LAYOUT), LAYOUT)
    assert found == Comparison(3 * S * VALUES + scales(tensors), set())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_blocks_that_end_early_are_found(scheme: str) -> None:
    tensors = stored(layer(scheme, RAGGED), SCHEMES[scheme], 0)
    found = compared(tensors, loaded(tensors, scheme, RAGGED), RAGGED)
    assert not found.not_compared
    assert found.compared > 3 * VALUES


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rank", [0, 1])
def test_another_ranks_shard_is_not_served(scheme: str, rank: int) -> None:
    """Rank 1's rows on rank 0, and the other way: of weights and scales, and of either alone."""
    tensors = stored(layer(scheme, LAYOUT), SCHEMES[scheme], 0)
    right, wrong = (loaded(tensors, scheme, LAYOUT, 2, held) for held in (rank, 1 - rank))
    found = compared(tensors, right, LAYOUT, rank)
    assert not found.not_compared
    assert found.compared >= 3 * S * VALUES // 2
    weights = {name: wrong[name] if name.endswith("_weight") else right[name] for name in right}
    faults = [wrong, weights]
    if SCHEMES[scheme].group != (0, 0):
        faults.append({name: right[name] if name.endswith("_weight") else wrong[name] for name in right})
    for fault in faults:
        with pytest.raises(AuditError, match=r"sampled values of [\w.]+ are not the checkpoint's"):
            compared(tensors, fault, LAYOUT, rank)


Change = Callable[[torch.Tensor], None]


def stale(scale: torch.Tensor) -> None:
    scale[E + 1] = 1.0


def shifted(scale: torch.Tensor) -> None:
    scale[E] = scale[E].roll(1, 0)


def other_slot(scale: torch.Tensor) -> None:
    scale[E] = scale[E + 1].clone()


def routed(scale: torch.Tensor) -> None:
    scale[E] = scale[0].clone()


def next_number(scale: torch.Tensor) -> None:
    """The smallest change that there is."""
    scale[E].copy_(torch.nextafter(scale[E], torch.full_like(scale[E], 9.0)))


FAULTS = [
    ("block", "w2_weight_scale_inv", stale),
    ("block", "w13_weight_scale_inv", shifted),
    ("block", "w2_weight_scale_inv", other_slot),
    ("block", "w13_weight_scale_inv", next_number),
    ("tensor", "w13_weight_scale", shifted),
    ("tensor", "w2_weight_scale", stale),
    ("tensor", "w13_weight_scale", routed),
    ("tensor, static", "w13_input_scale", stale),
    ("tensor, static", "w2_input_scale", routed),
    ("channel", "w13_weight_scale", other_slot),
    ("channel", "w2_weight_scale", shifted),
    ("channel by fbgemm", "w2_weight_scale", next_number),
]


@pytest.mark.parametrize(("scheme", "name", "fault"), FAULTS)
def test_a_scale_that_is_another_is_not_served(scheme: str, name: str, fault: Change) -> None:
    tensors = stored(layer(scheme, LAYOUT), SCHEMES[scheme], 0)
    slots = loaded(tensors, scheme, LAYOUT)
    compared(tensors, slots, LAYOUT)
    fault(slots[name])
    with pytest.raises(AuditError, match=rf"_proj\.{name.partition('_')[2]} are not the checkpoint's"):
        compared(tensors, slots, LAYOUT)


@pytest.mark.parametrize("bit", [0, 7])
def test_one_bit_of_a_weight_is_seen(bit: int) -> None:
    tensors = stored(layer("block", LAYOUT), SCHEMES["block"], 0)
    slots = loaded(tensors, "block", LAYOUT)
    slots["w2_weight"].view(torch.uint8)[E] ^= 1 << bit
    with pytest.raises(AuditError, match="sampled values of down_proj are"):
        compared(tensors, slots, LAYOUT)


def max_scale(slots: Tensors) -> Tensors:
    """One scale for gate and up of an expert, and both quantised again by it."""
    both = slots["w13_weight_scale"]
    whole = slots["w13_weight"].float() * both.repeat_interleave(I, dim=1)[:, :, None]
    largest = both.amax(dim=1)
    again = (whole / largest[:, None, None]).to(E4M3)
    return slots | {"w13_weight": again, "w13_weight_scale": largest}


def packed(slots: Tensors) -> Tensors:
    """As Marlin has it: integers of four weights each, in another order."""
    return slots | {
        name: slots[name].view(torch.int32).transpose(1, 2) for name in ("w13_weight", "w2_weight")
    }


def fnuz(slots: Tensors) -> Tensors:
    return slots | {n: t.to(torch.float8_e4m3fnuz) for n, t in slots.items() if n.endswith("_weight")}


def dequantised(slots: Tensors) -> Tensors:
    return {n: t.bfloat16() for n, t in slots.items() if n.endswith("_weight")}


def turned(slots: Tensors) -> Tensors:
    """Scales with rows for columns, as DeepGEMM wants them."""
    return slots | {n: t.transpose(1, 2) for n, t in slots.items() if n.endswith("_scale_inv")}


OTHERWISE: dict[str, tuple[str, Callable[[Tensors], Tensors], set[str]]] = {
    "largest scale": ("tensor", max_scale, {"w13_weight", "w13_weight_scale"}),
    "packed": (
        "channel",
        packed,
        {"w13_weight", "w2_weight", "w13_weight_scale", "w2_weight_scale"},
    ),
    "turned scales": (
        "block",
        turned,
        {"w13_weight", "w2_weight", "w13_weight_scale_inv", "w2_weight_scale_inv"},
    ),
    "FNUZ": ("block", fnuz, {"w13_weight", "w2_weight"}),
    "dequantised": (
        "block",
        dequantised,
        {"w13_weight", "w2_weight", "w13_weight_scale_inv", "w2_weight_scale_inv"},
    ),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_what_an_engine_holds_otherwise_is_said_to_be_not_compared(case: str) -> None:
    scheme, change, names = OTHERWISE[case]
    tensors = stored(layer(scheme, LAYOUT), SCHEMES[scheme], 0)
    slots = change(loaded(tensors, scheme, LAYOUT))
    found = compared(tensors, slots, LAYOUT)
    assert found.not_compared == names
    # What still lies as in the checkpoint is compared, and seen when it is wrong.
    left = [name for name in slots if name.endswith(("scale", "scale_inv")) and name not in names]
    assert bool(found.compared) == bool(left)
    for name in left:
        stale(slots[name])
        with pytest.raises(AuditError):
            compared(tensors, slots, LAYOUT)


def test_two_input_scales_that_became_one_are_not_judged() -> None:
    tensors = stored(layer("tensor, static", LAYOUT), SCHEMES["tensor, static"], 0)
    slots = loaded(tensors, "tensor, static", LAYOUT)
    assert not compared(tensors, slots, LAYOUT).not_compared
    name = f"{MLP}shared_expert.up_proj.input_scale"
    tensors[name] = tensors[name] * 2
    found = compared(tensors, slots, LAYOUT)
    assert found.not_compared == {"w13_input_scale"}


def test_one_input_scale_of_gate_and_up_is_compared() -> None:
    tensors = stored(layer("tensor, static", LAYOUT), SCHEMES["tensor, static"], 0)
    slots = loaded(tensors, "tensor, static", LAYOUT)
    del tensors[f"{MLP}shared_expert.up_proj.input_scale"]
    assert not compared(tensors, slots, LAYOUT).not_compared
    stale(slots["w13_input_scale"])
    with pytest.raises(AuditError, match=r"gate_proj\.input_scale"):
        compared(tensors, slots, LAYOUT)


def test_a_slot_of_one_block_has_its_scales() -> None:
    layout = ExpertLayout(E, S, 2, H, BLOCK)
    tensors = stored(layer("block", layout), SCHEMES["block"], 0)
    slots = loaded(tensors, "block", layout)
    assert not compared(tensors, slots, layout).not_compared
    for name in ("w13_weight_scale_inv", "w2_weight_scale_inv"):
        fault = {n: t.clone() for n, t in slots.items()}
        other_slot(fault[name])
        with pytest.raises(AuditError, match="slot 4: "):
            compared(tensors, fault, layout)


def test_a_last_block_that_is_not_full_is_compared_where_nothing_is_cut() -> None:
    layout = ExpertLayout(E, 1, 2, H, 2 * BLOCK + 16)
    tensors = stored(layer("block", layout), SCHEMES["block"], 0)
    assert not compared(tensors, loaded(tensors, "block", layout), layout).not_compared


def test_blocks_across_two_slots_are_not_judged() -> None:
    """Four blocks on 110 rows: two slots would have two each, and they end at row 55."""
    layout = ExpertLayout(E, 2, 2, H, 55)
    tensors = stored(layer("block", layout), SCHEMES["block"], 0)
    found = compared(tensors, loaded(tensors, "block", layout), layout)
    names = {f"{w}_{suffix}" for w in ("w13", "w2") for suffix in ("weight", "weight_scale_inv")}
    assert found == Comparison(0, names)


def test_packed_integers_are_not_judged() -> None:
    prefix = f"{MLP}shared_expert.gate_proj."
    tensors = {f"{prefix}qweight": torch.ones(12, 128).int(), f"{prefix}scales": torch.ones(3, 128)}
    found = compared(tensors, {"w2_weight": torch.ones(E + S, H, I)}, LAYOUT)
    assert found == Comparison(0, {"w13_qweight", "w13_scales"})
    down = {name.replace("gate_proj", "down_proj"): tensor for name, tensor in tensors.items()}
    found = compared(down, {"w2_weight": torch.ones(E + S, H, I)}, LAYOUT)
    assert found == Comparison(0, {"w2_qweight", "w2_scales"})


@pytest.mark.parametrize("shape", [(1, 1, 1), (7,)])
def test_a_scale_of_another_kind_says_nothing_of_its_weight(shape: tuple[int, ...]) -> None:
    tensors = stored(layer("tensor", LAYOUT), SCHEMES["tensor"], 0)
    slots = loaded(tensors, "tensor", LAYOUT)
    tensors[f"{MLP}shared_expert.down_proj.weight_scale"] = torch.ones(shape)
    assert compared(tensors, slots, LAYOUT).not_compared == {"w2_weight_scale"}


def test_scales_are_sampled_on_the_host() -> None:
    tensors = stored(layer("block", LAYOUT), SCHEMES["block"], 0)
    slots = loaded(tensors, "block", LAYOUT)
    with torch.device("meta"):
        found = compared(tensors, slots, LAYOUT)
    assert found == Comparison(3 * S * VALUES + scales(tensors), set())


def test_blocks_that_do_not_end_with_a_part_are_not_judged() -> None:
    """Two ranks of 48 columns, three blocks of 32: engines cut blocks finer, or refuse."""
    layout = ExpertLayout(E, 1, 2, H, 3 * BLOCK)
    tensors = stored(layer("block", layout), SCHEMES["block"], 0)
    whole = loaded(tensors, "block", layout)
    first = torch.cat([whole["w13_weight"][:, :48], whole["w13_weight"][:, 96:144]], dim=1)
    slots = whole | {"w13_weight": first, "w2_weight": whole["w2_weight"][:, :, :48]}
    found = compared(tensors, slots, layout)
    assert "w13_weight_scale_inv" in found.not_compared
    assert "w2_weight_scale_inv" in found.not_compared
    assert found.compared == 0


def test_scales_are_compared_where_weights_end_in_padding() -> None:
    tensors = stored(layer("tensor", LAYOUT), SCHEMES["tensor"], 0)
    slots = loaded(tensors, "tensor", LAYOUT)
    halves = slots["w13_weight"].float().unflatten(1, (2, I))
    wide = {
        "w13_weight": torch.nn.functional.pad(halves, (0, 0, 0, 16)).flatten(1, 2).to(E4M3),
        "w2_weight": torch.nn.functional.pad(slots["w2_weight"].float(), (0, 16)).to(E4M3),
    }
    sample = SlotSample(LAYOUT, "main", naming_of("qwen2_moe", 2), [1])
    list(sample.tap(tensors.items()))
    found = sample.compare(1, slots | wide, 0, 1)
    assert found == Comparison(3 * S * VALUES + scales(tensors), set())
