"""What a sample of the loaded slots tells: nothing where the load was right, and every wrong place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fse_patch.errors import AuditError
from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.weights.samples import VALUES, SlotSample

from .moe import naming_of

E, S, H, I = 4, 2, 16, 8  # noqa: E741
LAYOUT = ExpertLayout(E, S, 2, H, I)
PREFIX = "model.layers.0.mlp.shared_expert."
Slots = dict[str, torch.Tensor]


def checkpoint(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    shapes = {"gate_proj": (S * I, H), "up_proj": (S * I, H), "down_proj": (H, S * I)}
    return {f"{PREFIX}{n}.weight": torch.randn(*s, generator=draw).to(dtype) for n, s in shapes.items()}


def loaded(tensors: dict[str, torch.Tensor], parts: int = 1, rank: int = 0) -> Slots:
    """The fused parameters of one process, written here by hand."""
    held = I // parts
    w13, w2 = torch.zeros(E + S, 2 * held, H), torch.zeros(E + S, H, held)
    gate, up, down = (tensors[f"{PREFIX}{p}.weight"] for p in ("gate_proj", "up_proj", "down_proj"))
    for slot in range(S):
        part = slice(slot * I + rank * held, slot * I + (rank + 1) * held)
        w13[E + slot] = torch.cat([gate[part], up[part]])
        w2[E + slot] = down[:, part]
    return {"w13_weight": w13, "w2_weight": w2}


def compared(tensors: dict[str, torch.Tensor], slots: Slots, rank: int = 0) -> int:
    sample = SlotSample(LAYOUT, "main", naming_of("qwen2_moe", 1), [0])
    assert list(sample.tap(tensors.items())) == list(tensors.items())
    return sample.compare(0, slots, rank).compared


def test_what_was_loaded_rightly_is_found() -> None:
    assert compared(checkpoint(), loaded(checkpoint())) == 3 * S * VALUES


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_has_its_part(rank: int) -> None:
    assert compared(checkpoint(), loaded(checkpoint(), 2, rank), rank) == 3 * S * VALUES // 2
    with pytest.raises(AuditError):
        compared(checkpoint(), loaded(checkpoint(), 2, 1 - rank), rank)


def test_the_checkpoint_is_compared_as_the_engine_holds_it() -> None:
    tensors = checkpoint()
    narrow = {name: slots.to(torch.bfloat16) for name, slots in loaded(tensors).items()}
    assert compared(tensors, narrow) == 3 * S * VALUES


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_padded_is_compared_too(rank: int) -> None:
    held, padded = I // 2, I // 2 + 3
    slots = loaded(checkpoint(), 2, rank)
    w13 = torch.zeros(E + S, 2, padded, H)
    w13[:, :, :held] = slots["w13_weight"].unflatten(1, (2, held))
    w2 = torch.zeros(E + S, H, padded)
    w2[:, :, :held] = slots["w2_weight"]
    wide = {"w13_weight": w13.flatten(1, 2), "w2_weight": w2}
    sample = SlotSample(LAYOUT, "main", naming_of("qwen2_moe", 1), [0])
    list(sample.tap(checkpoint().items()))
    assert sample.compare(0, wide, rank, 2).compared == 3 * S * VALUES // 2
    wide["w2_weight"][E:, :, :held] *= 1.0001
    with pytest.raises(AuditError):
        sample.compare(0, wide, rank, 2)


def change(name: str, alter: Callable[[torch.Tensor], None]) -> Slots:
    slots = loaded(checkpoint())
    alter(slots[name])
    return slots


def swap_shards(w13: torch.Tensor) -> None:
    w13[E:] = torch.cat([w13[E:, I:], w13[E:, :I]], dim=1)


def swap_slots(w13: torch.Tensor) -> None:
    w13[E:] = w13[[E + 1, E]].clone()


def same_slot_twice(w2: torch.Tensor) -> None:
    w2[E + 1] = w2[E]


def transpose(w2: torch.Tensor) -> None:
    w2[E, :I] = w2[E, :I].T.clone()


def next_expert(w2: torch.Tensor) -> None:
    w2[E - 1 : E + 1] = w2[E : E + 2].clone()


def scale_a_little(w13: torch.Tensor) -> None:
    w13[E + 1, I:] *= 1.0001


FAULTS: dict[str, tuple[str, Callable[[torch.Tensor], None]]] = {
    f.__name__: (name, f)
    for name, f in (
        ("w13_weight", swap_shards),
        ("w13_weight", swap_slots),
        ("w2_weight", same_slot_twice),
        ("w2_weight", transpose),
        ("w2_weight", next_expert),
        ("w13_weight", scale_a_little),
    )
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_was_loaded_wrongly_is_not_served(fault: str) -> None:
    with pytest.raises(AuditError, match=r"sampled values of \w+ are not the checkpoint's; .* not served"):
        compared(checkpoint(), change(*FAULTS[fault]))


def test_another_layout_than_the_checkpoints_is_not_judged() -> None:
    slots = {name: tensor.transpose(1, 2) for name, tensor in loaded(checkpoint()).items()}
    assert compared(checkpoint(), slots) == 0


def test_a_checkpoint_in_16_bit_is_compared() -> None:
    tensors = checkpoint(torch.bfloat16)
    assert compared(tensors, loaded(tensors)) == 3 * S * VALUES
    fault = loaded(tensors)
    scale_a_little(fault["w13_weight"])
    with pytest.raises(AuditError):
        compared(tensors, fault)


def test_the_place_and_the_number_of_wrong_values_are_named() -> None:
    slots = loaded(checkpoint())
    slots["w13_weight"][E + 1, I:] += 1.0
    with pytest.raises(AuditError) as error:
        compared(checkpoint(), slots)
    assert str(error.value) == (
        f"main model: layer 0 slot {E + 1}: {VALUES} of {VALUES} sampled values of up_proj are not the "
        "checkpoint's; the model is not served"
    )


def test_gate_and_up_in_one_tensor_are_two() -> None:
    tensors = checkpoint()
    gate, up = (tensors.pop(f"{PREFIX}{p}_proj.weight") for p in ("gate", "up"))
    tensors[f"{PREFIX}gate_up_proj.weight"] = torch.cat([gate, up])
    assert compared(tensors, loaded(checkpoint())) == 3 * S * VALUES
    for rows, name in ((slice(I), "gate_proj"), (slice(I, None), "up_proj")):
        slots = loaded(checkpoint())
        slots["w13_weight"][E, rows] += 1.0
        with pytest.raises(AuditError, match=f"{VALUES} of {VALUES} sampled values of {name} are not"):
            compared(tensors, slots)


Drop = Callable[[Slots], Slots]
# Parameters that have no padding which could be cut: what they are is not known, so nothing is compared.
NOT_PADDED: dict[str, Drop] = {
    "no w2": lambda slots: {"w13_weight": slots["w13_weight"]},
    "no w13": lambda slots: {"w2_weight": slots["w2_weight"].repeat(1, 1, 2)},
    "w2 is flat": lambda slots: slots | {"w2_weight": slots["w2_weight"].flatten(1)},
    "w2 alone is wider": lambda slots: (
        slots | {"w2_weight": torch.nn.functional.pad(slots["w2_weight"], (0, 3))}
    ),
}


@pytest.mark.parametrize("case", NOT_PADDED)
def test_what_is_not_padded_is_not_cut(case: str) -> None:
    sample = SlotSample(LAYOUT, "main", naming_of("qwen2_moe", 1), [0])
    list(sample.tap(checkpoint().items()))
    found = sample.compare(0, NOT_PADDED[case](loaded(checkpoint())), 0, 1)
    assert (found.compared, found.not_compared) == (0, {"w13_weight", "w2_weight"})


def test_the_sample_is_drawn_on_the_host_and_the_same_in_every_process() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    slots, tensors = loaded(checkpoint()), checkpoint()
    with torch.device("meta"):  # engines load with a device of their own as the default
        assert compared(tensors, slots) == 3 * S * VALUES
    assert torch.equal(torch.get_rng_state(), before)


def test_padding_is_cut_where_the_number_of_parts_is_known() -> None:
    slots = loaded(checkpoint())
    w13 = torch.nn.functional.pad(slots["w13_weight"].unflatten(1, (2, I)), (0, 0, 0, 3)).flatten(1, 2)
    wide = {"w13_weight": w13, "w2_weight": torch.nn.functional.pad(slots["w2_weight"], (0, 3))}
    sample = SlotSample(LAYOUT, "main", naming_of("qwen2_moe", 1), [0])
    list(sample.tap(checkpoint().items()))
    assert sample.compare(0, wide, 0, 1).compared == 3 * S * VALUES
    assert sample.compare(0, wide, 0).compared == 0


def test_parameters_of_other_sizes_are_none_of_the_experts() -> None:
    sample = SlotSample(LAYOUT, "main", naming_of("qwen2_moe", 1), [0])
    list(sample.tap(checkpoint().items()))
    slots = loaded(checkpoint())
    slots |= {"w13_scale": torch.ones(()), "w13_weight": slots["w13_weight"][1:]}
    found = sample.compare(0, slots, 0)
    assert (found.compared, found.not_compared) == (S * VALUES, {"w13_weight"})


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight[:, 1:],
        lambda weight: weight[1:],
        lambda weight: weight[None],
        lambda weight: weight.to(torch.int8),
        lambda weight: weight.flatten(),
    ],
)
def test_a_weight_of_another_kind_is_the_remaps_to_refuse(
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    tensors = checkpoint()
    tensors[f"{PREFIX}down_proj.weight"] = change(tensors[f"{PREFIX}down_proj.weight"])
    sample = SlotSample(LAYOUT, "main", naming_of("qwen2_moe", 1), [0])
    list(sample.tap(tensors.items()))
    found = sample.compare(0, loaded(checkpoint()), 0)
    assert (found.compared, found.not_compared) == (2 * S * VALUES, {"w2_weight"})
