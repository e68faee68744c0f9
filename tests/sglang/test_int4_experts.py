"""SGLang's own schemes load 4-bit experts and pack them for Marlin and Triton; read is what was drawn.

Repacking for Marlin runs on a GPU alone; the published layout in torch stands in for that one step.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fse_patch.adapters.sglang.int4 import int4_backend, int4_experts

from ..int4_layers import (
    DTYPE,
    EXPERTS,
    FAULTS,
    HIDDEN,
    PACKED_FOR_MARLIN,
    WIDTH,
    Drawn,
    awq_numbers,
    check_plain_bytes,
    check_read,
    drawn,
    fill,
    gptq_numbers,
    off,
    refusal_of,
)
from ..kernels import int4

pytestmark = pytest.mark.every_release
GPU = "sglang.srt.hardware_backend.gpu.quantization"
PACKED = "sglang.srt.layers.quantization.compressed_tensors.schemes.compressed_tensors_wNa16_moe"


def repacked(unpack: Any) -> Any:
    """Marlin's layout of all experts."""

    def repack(packed: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        numbers = torch.stack([unpack(expert).t() for expert in packed])
        return int4.marlin_weights(numbers.contiguous())

    return repack


@pytest.fixture(autouse=True)
def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import sglang.srt.layers.quantization  # noqa: F401 - first: its modules import each other

    monkeypatch.setattr(f"{GPU}.gptq_kernels.gptq_marlin_moe_repack", repacked(gptq_numbers), raising=False)
    monkeypatch.setattr(f"{GPU}.awq_kernels.awq_marlin_moe_repack", repacked(awq_numbers), raising=False)
    monkeypatch.setattr(f"{PACKED}.gptq_marlin_moe_repack", repacked(gptq_numbers), raising=False)
    monkeypatch.setattr(f"{PACKED}.marlin_make_workspace", lambda *_: None)


def scheme_of(held: Drawn, triton: bool = False, symmetric: bool = True) -> Any:
    """A scheme as SGLang makes it on a GPU."""
    from sglang.srt.layers.quantization.compressed_tensors import schemes

    if held.kind == "packed":
        from compressed_tensors.quantization import QuantizationArgs

        cls = schemes.CompressedTensorsWNA16TritonMoE if triton else schemes.CompressedTensorsWNA16MoE
        weights = QuantizationArgs(
            num_bits=4, type="int", strategy="group", group_size=held.group, symmetric=symmetric
        )
        return cls(SimpleNamespace(quant_format="pack-quantized"), weight_quant=weights)
    config = SimpleNamespace(weight_bits=4, group_size=held.group, pack_factor=8, desc_act=False)
    if held.kind == "awq":
        from sglang.srt.layers.quantization.awq.schemes import AWQMoEScheme

        return AWQMoEScheme(config)
    from sglang.srt.layers.quantization.gptq.schemes import GPTQMarlinMoEScheme

    return GPTQMarlinMoEScheme(config)


def layer_of(held: Drawn, width: int = WIDTH, **how: Any) -> Any:
    """A layer that SGLang's scheme has made, loaded and packed."""
    layer = torch.nn.Module()
    layer.scheme, layer.quant_method = scheme_of(held, **how), SimpleNamespace()
    layer.hidden_size, layer.intermediate_size_per_partition = HIDDEN, width
    layer.moe_runner_config, layer.moe_tp_size = SimpleNamespace(params_dtype=DTYPE), 1
    layer.scheme.create_weights(layer, EXPERTS, HIDDEN, width, DTYPE, weight_loader=None)
    fill(layer, held, transposed=held.kind == "packed")
    layer.scheme.process_weights_after_loading(layer)
    return layer


@pytest.mark.parametrize(("kind", "group"), PACKED_FOR_MARLIN)
def test_marlin(kind: str, group: int) -> None:
    held = drawn(kind, group)
    layer = layer_of(held)
    assert int4_backend(layer) == "int4 marlin"
    weights = check_read(int4_experts(layer), held, FAULTS)
    name = "w13_weight_packed" if kind == "packed" else "w13_qweight"
    assert weights.w13.data_ptr() == getattr(layer, name).data_ptr()  # in place
    assert weights.format.startswith(f"int4 g{group}")


@pytest.mark.parametrize("group", [32, 128])
def test_triton(group: int) -> None:
    held = drawn("packed", group)
    weights = check_read(int4_experts(layer_of(held, triton=True)), held, FAULTS[:1])
    assert weights.format == f"int4 g{group}, packed_bytes"


@pytest.mark.parametrize("zeros", [False, True])
def test_plain_bytes(zeros: bool) -> None:
    """MoeWNA16's own parameters; its loader brings a checkpoint's in their order as it loads them."""
    from sglang.srt.layers.quantization.moe_wna16 import MoeWNA16Method

    held = drawn("packed", 32)
    config = SimpleNamespace(weight_bits=4, group_size=32, bit8_pack_factor=2, has_zp=zeros, full_config={})
    layer, config.linear_quant_method = torch.nn.Module(), "gptq"
    method = layer.quant_method = MoeWNA16Method(config)
    layer.hidden_size, layer.intermediate_size_per_partition = HIDDEN, WIDTH
    layer.moe_runner_config = SimpleNamespace(params_dtype=DTYPE)
    method.create_weights(layer, EXPERTS, HIDDEN, WIDTH, DTYPE, weight_loader=None)
    assert int4_backend(layer) == "int4 bytes"
    check_plain_bytes(int4_experts, layer, held, zeros)


def refused(layer: Any) -> tuple[str, str]:
    return refusal_of(int4_experts, layer)


def test_what_a_checkpoint_or_a_setting_brings_is_refused() -> None:
    layer = layer_of(drawn("gptq"))
    layer.moe_runner_config.params_dtype = torch.bfloat16
    assert refused(layer) == ("quant.layout", "scales are in float16, states in bfloat16")
    layer = layer_of(drawn("gptq"))
    layer.scheme.quant_config.desc_act = True
    assert "g_idx" in refused(layer)[1]
    layer = layer_of(drawn("awq"))
    layer.w13_qzeros = torch.nn.Parameter(torch.empty(0, dtype=torch.int32), requires_grad=False)
    assert "zero points" in refused(layer)[1]


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_where_sglang_itself_is_wrong(kind: str) -> None:
    """With one group in a row of w2, SGLang orders the scales of w13 as if it had one as well."""
    held = drawn(kind, 128, width=128)
    layer = layer_of(held, width=128)
    code, words = refused(layer)
    assert (code, "50196" in words) == ("upstream.wrong", True)
    # The control, without the refusal: what lies there is not what was loaded.
    layer.intermediate_size_per_partition = 2 * WIDTH
    weights = int4_experts(layer)
    assert weights is not None
    assert off(weights, held) > 1e-3


def test_zero_points_of_compressed_tensors_are_in_a_wrong_order_in_sglang() -> None:
    from sglang.srt.layers.quantization import marlin_utils

    from fse_patch.fusion_core.kernels.int4_reference import tile_zeros

    numbers = torch.arange(64, dtype=torch.uint8).view(1, 64, 1) % 16  # [E, N, groups]
    from checkpoints.int4 import AWQ_ORDER, words

    stored = words(numbers.transpose(1, 2))  # as compressed-tensors has them
    points = marlin_utils.moe_awq_to_marlin_zero_points(stored, 1, 64, 4)
    assert not torch.equal(tile_zeros(points), numbers)
    # The control: as AWQ has them, they come out right.
    awq = words(numbers.transpose(1, 2).unflatten(2, (-1, 8))[..., AWQ_ORDER].flatten(2))
    points = marlin_utils.moe_awq_to_marlin_zero_points(awq, 1, 64, 4)
    assert torch.equal(tile_zeros(points), numbers)
    layer = layer_of(drawn("packed"))
    layer.scheme.sym = False
    assert refused(layer)[0] == "upstream.wrong"


def test_other_experts_are_none_of_these() -> None:
    layer = layer_of(drawn("gptq"))
    layer.scheme.quant_config.weight_bits = 8
    assert (int4_backend(layer), int4_experts(layer)) == ("", None)
