"""What the canary reads of packed integers: bit by bit by the definition; contradictions are no reference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from fse_patch.errors import NoReference  # noqa: E402
from fse_patch.fusion_core.checkpoint.config import UNQUANTISED  # noqa: E402
from fse_patch.fusion_core.decision.layout import ExpertLayout  # noqa: E402
from fse_patch.fusion_core.proof.canary import CanaryError, judge, reference  # noqa: E402
from fse_patch.fusion_core.proof.checkpoint_layer import CheckpointLayer  # noqa: E402
from fse_patch.fusion_core.proof.rounding import Served  # noqa: E402
from fse_patch.fusion_core.quant import packed  # noqa: E402
from fse_patch.fusion_core.quant.claims import Claim  # noqa: E402

from .checkpoints import tensors_of  # noqa: E402
from .moe import decision, naming_of  # noqa: E402
from .safetensors import save  # noqa: E402

OUT, IN, GROUP = 24, 64, 16
BF16 = torch.bfloat16
F32 = Served(*[torch.float32] * 4)
Tensors = dict[str, torch.Tensor]


class Drawn:
    """Random numbers, scales and zero points of a matrix [OUT, IN], and its weights, one by one."""

    def __init__(self, bits: int = 4, zeros: bool = True, seed: int = 0, out: int = OUT, inner: int = IN):
        draw = torch.Generator().manual_seed(seed)
        self.bits, self.out, self.inner = bits, out, inner
        top, groups = 2**bits, inner // GROUP
        self.numbers = torch.randint(0, top, (out, inner), generator=draw).tolist()
        low = 1 if zeros else top // 2  # GPTQ stores one less
        high = top if zeros else top // 2 + 1
        self.zeros = torch.randint(low, high, (out, groups), generator=draw).tolist()
        self.scales = (torch.rand(out, groups, generator=draw) + 0.5).half()
        self.index = [column // GROUP for column in range(inner)]

    def weight(self, dtype: torch.dtype = BF16) -> torch.Tensor:
        scales = self.scales.to(dtype).double().tolist()
        rows = range(self.out)
        return torch.tensor(
            [
                [
                    (self.numbers[n][k] - self.zeros[n][self.index[k]]) * scales[n][self.index[k]]
                    for k in range(self.inner)
                ]
                for n in rows
            ],
            dtype=torch.float64,
        )


def words(rows: list[list[int]], bits: int) -> torch.Tensor:
    """Numbers of each row in words of 32 bits, the first one in the lowest bits."""
    each = 32 // bits
    made = []
    for row in rows:
        parts = [row[start : start + each] for start in range(0, len(row), each)]
        held = [sum(number << bits * place for place, number in enumerate(part)) for part in parts]
        made.append([word - 2**32 if word >= 2**31 else word for word in held])
    return torch.tensor(made, dtype=torch.int32)


def turned(rows: list[list[int]]) -> list[list[int]]:
    return [list(column) for column in zip(*rows, strict=True)]


def gptq(drawn: Drawn, less: int = 1) -> Tensors:
    return {
        "qweight": words(drawn.numbers, drawn.bits).t().contiguous(),
        "qzeros": words(turned([[z - less for z in row] for row in drawn.zeros]), drawn.bits),
        "scales": drawn.scales.t().contiguous(),
        "g_idx": torch.tensor(drawn.index, dtype=torch.int32),
    }


def awq(drawn: Drawn) -> Tensors:
    # As AutoAWQ's packer has it: of eight columns, which one is put where.
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def packed_rows(rows: list[list[int]]) -> torch.Tensor:
        eights = [[row[start : start + 8] for start in range(0, len(row), 8)] for row in turned(rows)]
        return words([[eight[place] for eight in row for place in order] for row in eights], 4)

    return {
        "qweight": packed_rows(drawn.numbers),
        "qzeros": packed_rows(drawn.zeros),
        "scales": drawn.scales.t().contiguous(),
    }


def compressed(drawn: Drawn, points: bool = False) -> Tensors:
    made = {
        "weight_packed": words(drawn.numbers, drawn.bits),
        "weight_scale": drawn.scales,
        "weight_shape": torch.tensor([drawn.out, drawn.inner], dtype=torch.int32),
    }
    if points:
        made["weight_zero_point"] = words(turned(drawn.zeros), drawn.bits).t().contiguous()
    return made


def claim(bits: int, *details: str) -> Claim:
    return Claim("", bits, (1, GROUP), details=details)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_gptq(bits: int, dtype: torch.dtype) -> None:
    drawn = Drawn(bits)
    found = packed.gptq(gptq(drawn), claim(bits, "zero points"), dtype)
    assert torch.equal(found, drawn.weight(dtype))
    second = packed.gptq(gptq(drawn, less=0), claim(bits, "zero points", "gptq_v2"), dtype)
    assert torch.equal(second, drawn.weight(dtype))
    # The control: the layout that is not declared.
    assert not torch.equal(packed.gptq(gptq(drawn, less=0), claim(bits, "zero points"), dtype), second)


def test_gptq_in_an_order_of_columns_and_without_one() -> None:
    drawn = Drawn()
    stored = gptq(drawn)
    del stored["g_idx"]
    assert torch.equal(packed.gptq(stored, claim(4, "zero points"), BF16), drawn.weight())
    drawn.index = [(column * 7) % IN // GROUP for column in range(IN)]
    assert torch.equal(packed.gptq(gptq(drawn), claim(4, "zero points"), BF16), drawn.weight())
    assert not torch.equal(packed.gptq(stored, claim(4, "zero points"), BF16), drawn.weight())


def test_awq() -> None:
    drawn = Drawn()
    assert torch.equal(packed.awq(awq(drawn), claim(4, "zero points"), BF16), drawn.weight())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("points", [False, True])
def test_compressed_tensors(bits: int, points: bool) -> None:
    drawn = Drawn(bits, zeros=points)
    assert torch.equal(packed.compressed(compressed(drawn, points), claim(bits), BF16), drawn.weight())


def no_middle() -> tuple[Any, ...]:
    return packed.gptq, gptq(Drawn()), claim(4, "symmetric")


def no_points() -> tuple[Any, ...]:
    return packed.awq, awq(Drawn()), claim(4, "no zero points")


def another_shape() -> tuple[Any, ...]:
    stored = compressed(Drawn(zeros=False))
    return packed.compressed, stored | {"weight_shape": torch.tensor([IN, OUT])}, claim(4)


def no_such_group() -> tuple[Any, ...]:
    stored = gptq(Drawn())
    return packed.gptq, stored | {"g_idx": stored["g_idx"] + 1}, claim(4, "zero points")


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (no_middle, "not those of a symmetric weight"),
        (no_points, "engines differ"),
        (another_shape, "weight_shape is"),
        (no_such_group, "a column is of group 4, and there are 4"),
    ],
)
def test_what_contradicts_itself_is_no_reference(case: Callable[[], tuple[Any, ...]], said: str) -> None:
    read, stored, claimed = case()
    with pytest.raises(NoReference, match=said):
        read(stored, claimed, BF16)


CONFIGS: dict[str, tuple[Callable[[Drawn], Tensors], dict[str, Any]]] = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True}),
    "auto-round": (
        lambda drawn: {name: t for name, t in gptq(drawn).items() if name != "g_idx"},
        {"quant_method": "auto-round", "bits": 4, "group_size": GROUP, "sym": False},
    ),
    "compressed-tensors": (
        lambda drawn: compressed(drawn, points=True),
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 4,
                        "type": "int",
                        "symmetric": False,
                        "strategy": "group",
                        "group_size": GROUP,
                    },
                }
            },
        },
    ),
}
LAYOUT = ExpertLayout(2, 1, 1, 32, 16)
MLP = "model.layers.1.mlp."
OWNERS = ("experts.0", "experts.1", "shared_expert")
SHAPES = {"gate_proj": (16, 32), "up_proj": (16, 32), "down_proj": (32, 16)}


def gates() -> Tensors:
    draw = torch.Generator().manual_seed(99)
    rows = {"gate": LAYOUT.num_routed, "shared_expert_gate": 1}
    return {
        f"{MLP}{name}.weight": torch.randn(count, LAYOUT.hidden_size, generator=draw)
        for name, count in rows.items()
    }


def opened(folder: Path, tensors: Tensors, method: str, config: dict[str, Any] | None) -> CheckpointLayer:
    folder.mkdir(exist_ok=True)
    save(folder / "model.safetensors", gates() | tensors)
    text = {"model_type": "qwen2_moe"} | ({} if config is None else {"quantization_config": config})
    (folder / "config.json").write_text(json.dumps(text))
    return CheckpointLayer(tensors_of(folder), naming_of("qwen2_moe", 2), "main", method, 1)


def written(folder: Path, method: str, leave_out: str = "") -> tuple[CheckpointLayer, dict[str, Drawn]]:
    """A layer whose routed and shared experts are all packed, and what was drawn for it."""
    pack, config = CONFIGS[method]
    drawn: dict[str, Drawn] = {}
    tensors: Tensors = {}
    for owner in OWNERS:
        for projection, (out, inner) in SHAPES.items():
            name = f"{owner}.{projection}"
            drawn[name] = Drawn(seed=len(drawn), out=out, inner=inner)
            parts = pack(drawn[name])
            tensors |= {f"{MLP}{name}.{part}": t for part, t in parts.items() if part != leave_out}
    return opened(folder, tensors, method, config), drawn


@pytest.mark.parametrize("method", CONFIGS)
def test_a_layer_of_packed_experts(tmp_path: Path, method: str) -> None:
    layer, drawn = written(tmp_path, method)
    for expert, owner in ((0, "experts.0"), (1, "experts.1"), (None, "shared_expert")):
        gate, up = layer.gate_up(expert, BF16)
        found = {"gate_proj": gate, "up_proj": up, "down_proj": layer.down(expert, BF16)}
        for projection, weight in found.items():
            assert torch.equal(weight, drawn[f"{owner}.{projection}"].weight())
    # Kernels of 4 bits leave activations as they are.
    assert layer.kernels() == ()


def test_a_tensor_that_is_missing_is_no_reference(tmp_path: Path) -> None:
    layer, _ = written(tmp_path, "gptq", leave_out="scales")
    with pytest.raises(NoReference, match="are not int4-gptq"):
        layer.down(0, BF16)


@pytest.mark.parametrize("method", CONFIGS)
def test_the_canary_tells_a_layer_from_one_with_a_wrong_number(tmp_path: Path, method: str) -> None:
    moe = decision(LAYOUT, None, "sigmoid_gate", layers=(1,), model_type="qwen2_moe").moe
    layer, drawn = written(tmp_path / "packed", method)
    expected = reference(layer, moe, F32)

    def output_of(weights: Tensors, name: str) -> torch.Tensor:
        """Of a plain layer: what an engine makes of these numbers, whatever holds them."""
        tensors = {f"{MLP}{owner}.weight": weight.float() for owner, weight in weights.items()}
        return reference(opened(tmp_path / name, tensors, UNQUANTISED, None), moe, F32).output

    right = {owner: numbers.weight(torch.float32) for owner, numbers in drawn.items()}
    assert judge("main", 1, expected, output_of(right, "right")) < 1e-5
    wrong = {**right, "shared_expert.up_proj": right["shared_expert.up_proj"].clone()}
    wrong["shared_expert.up_proj"][3] += drawn["shared_expert.up_proj"].scales[3, 0].double()
    with pytest.raises(CanaryError):
        judge("main", 1, expected, output_of(wrong, "wrong"))
