"""vLLM's own methods load 4-bit experts and pack them for Marlin and Triton; what is read is what was drawn.

Repacking for Marlin runs on a GPU alone; vLLM's own layout of the same in torch stands in for that one step.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version

from fse_patch.adapters.patching import guards, ledger
from fse_patch.adapters.vllm.int4 import int4_backend, int4_experts

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

pytestmark = pytest.mark.every_release
# Parameters of compressed-tensors, as these releases make them.
COLUMNS_FIRST = Version(guards.engine_version(ledger.load("vllm"))) < Version("0.30")
ORACLE = "vllm.model_executor.layers.fused_moe.oracle.int_wna16"


def repacked(unpack: Any) -> Any:
    """Marlin's layout of all experts, by vLLM's own tables; older releases hand in an order of columns."""
    from vllm.model_executor.layers.quantization.utils import marlin_utils_test

    def repack(packed: torch.Tensor, *sizes: Any, **named: Any) -> torch.Tensor:
        eight = named.get("is_a_8bit", False)
        order = marlin_utils_test.get_weight_perm(4, is_a_8bit=eight)
        tiles = []
        for expert in packed:
            numbers = unpack(expert)
            k, n = numbers.shape
            tiles.append(marlin_utils_test.marlin_weights(numbers, k, n, 4, order, is_a_8bit=eight))
        return torch.stack(tiles)

    return repack


@pytest.fixture(autouse=True)
def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{ORACLE}.ops.gptq_marlin_moe_repack", repacked(gptq_numbers))
    monkeypatch.setattr(f"{ORACLE}.ops.awq_marlin_moe_repack", repacked(awq_numbers))


def config_of(held: Drawn) -> Any:
    from vllm.model_executor.layers.quantization import auto_awq, auto_gptq

    if held.kind == "awq":
        return auto_awq.AutoAWQConfig(4, held.group, True, False, [], {})
    return auto_gptq.AutoGPTQConfig(4, held.group, False, True, False, {}, {})


def method_of(held: Drawn, backend: str, runs: str) -> Any:
    """A method as vLLM makes it on a GPU: which kernel it picks is the one thing that is said here."""
    from vllm.model_executor.layers.fused_moe.oracle import int_wna16
    from vllm.model_executor.layers.quantization import auto_awq, auto_gptq
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16 as packed,
    )

    if held.kind == "packed":
        from compressed_tensors.quantization import QuantizationArgs

        method = object.__new__(packed.CompressedTensorsWNA16MoEMethod)
        method.weight_quant = QuantizationArgs(
            num_bits=4, type="int", strategy="group", group_size=held.group
        )
        method.symmetric, method.num_bits, method.group_size = True, 4, held.group
        method.actorder = None  # of releases before 0.30
        method.packed_factor, method.strategy, method.is_transposed = 8, "group", COLUMNS_FIRST
        method.wna16_backend, method.is_marlin = int_wna16.WNA16MoEBackend[backend], backend == "MARLIN"
    else:
        cls = auto_awq.AutoAWQMoEMethod if held.kind == "awq" else auto_gptq.AutoGPTQMoEMethod
        method = object.__new__(cls)
        method.quant_config = config_of(held)
        method.wna16_moe_backend = int_wna16.WNA16MoEBackend[backend]
    method.moe = SimpleNamespace(w13_num_shards=2, is_act_and_mul=True, has_bias=False, activation=None)
    method.experts_cls, method.input_dtype, method.moe_quant_config = getattr(int_wna16, runs), None, None
    method.moe_kernel = None
    return method


def layer_of(held: Drawn, backend: str = "MARLIN", runs: str = "MarlinExperts", width: int = WIDTH) -> Any:
    """A layer that vLLM's method has made, loaded and packed."""
    method = method_of(held, backend, runs)
    layer = torch.nn.Module()
    layer.quant_method = method
    layer.hidden_size, layer.intermediate_size_per_partition = HIDDEN, width
    layer.moe_config, layer._loaded_expert_biases = SimpleNamespace(in_dtype=DTYPE), set()
    method.create_weights(
        layer, EXPERTS, HIDDEN, width, DTYPE, weight_loader=None, intermediate_size_full=width
    )
    fill(layer, held, transposed=held.kind == "packed" and COLUMNS_FIRST)
    # All but the kernel itself, which asks for a GPU.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(method), "_setup_kernel", lambda *_: None)
        method.process_weights_after_loading(layer)
    return layer


@pytest.mark.parametrize(("kind", "group"), PACKED_FOR_MARLIN)
def test_marlin(kind: str, group: int) -> None:
    held = drawn(kind, group)
    layer = layer_of(held)
    assert int4_backend(layer) == "int4 marlin"
    weights = check_read(int4_experts(layer), held, FAULTS)
    assert weights.w13.data_ptr() == layer.w13_weight.data_ptr()  # in place
    assert weights.format.startswith(f"int4 g{group}")


@pytest.mark.parametrize(("kind", "group"), [kind for kind in PACKED_FOR_MARLIN if kind[0] != "awq"])
def test_triton(kind: str, group: int) -> None:
    held = drawn(kind, group)
    weights = check_read(int4_experts(layer_of(held, "TRITON", "TritonWNA16Experts")), held, FAULTS[:1])
    assert weights.format == f"int4 g{group}, packed_bytes"


def refused(layer: Any) -> tuple[str, str]:
    return refusal_of(int4_experts, layer)


def test_what_a_setting_brings_is_refused() -> None:
    held = drawn("packed", 128)
    layer = layer_of(held)
    layer.quant_method.input_dtype = torch.int8
    layer.quant_method.moe_kernel = SimpleNamespace(fused_experts=SimpleNamespace(input_dtype=torch.int8))
    code, words = refused(layer)
    assert (code, "VLLM_MARLIN_INPUT_DTYPE" in words) == ("quant.layout", True)
    # AutoRound's are packed without a look at the setting, by which the kernel then multiplies.
    layer.quant_method.input_dtype = None
    code, words = refused(layer)
    assert (code, "multiplies in int8" in words) == ("upstream.wrong", True)
    layer.quant_method.moe_kernel = None
    layer.moe_config.in_dtype = torch.bfloat16
    assert refused(layer) == ("quant.layout", "scales are in float16, states in bfloat16")


def test_what_a_checkpoint_brings_is_refused() -> None:
    layer = layer_of(drawn("gptq"))
    layer.quant_method.quant_config.desc_act = True
    assert refused(layer)[0] == "quant.layout"
    layer = layer_of(drawn("gptq"))
    for part in ("w13", "w2"):
        order = torch.nn.Parameter(torch.zeros(EXPERTS, 8, dtype=torch.int32), requires_grad=False)
        setattr(layer, f"{part}_g_idx", order)
    assert "g_idx" in refused(layer)[1]
    layer = layer_of(drawn("gptq"))
    layer.w13_bias = torch.nn.Parameter(torch.zeros(EXPERTS, 2 * WIDTH, dtype=DTYPE))
    layer.w2_bias = torch.nn.Parameter(torch.zeros(EXPERTS, HIDDEN, dtype=DTYPE))
    assert refused(layer) == ("quant.layout", "experts have biases")


@pytest.mark.parametrize("kind", ["gptq", "awq", "packed"])
def test_where_vllm_itself_is_wrong(kind: str) -> None:
    """With one group in a row of w2, vLLM orders the scales of w13 as if it had one as well."""
    held = drawn(kind, 128, width=128)
    layer = layer_of(held, width=128)
    code, words = refused(layer)
    assert code == "upstream.wrong"
    assert "50196" in words
    # The control, without the refusal: what lies there is not what was loaded.
    layer.intermediate_size_per_partition = 2 * WIDTH
    weights = int4_experts(layer)
    assert weights is not None
    assert off(weights, held) > 1e-3


def test_another_kernel_is_named() -> None:
    layer = layer_of(drawn("gptq"))
    layer.quant_method.experts_cls = type("TrtLlmMxint4ExpertsMonolithic", (), {})
    assert int4_backend(layer) == "int4 TrtLlmMxint4ExpertsMonolithic"
    assert refused(layer) == (
        "backend.layout",
        "the engine runs 4-bit experts by TrtLlmMxint4ExpertsMonolithic",
    )


def test_other_experts_are_none_of_these() -> None:
    layer = layer_of(drawn("gptq"))
    layer.quant_method.quant_config.weight_bits = 8
    assert (int4_backend(layer), int4_experts(layer)) == ("", None)


@pytest.mark.parametrize("zeros", [False, True])
def test_plain_bytes(zeros: bool) -> None:
    """MoeWNA16's own parameters; its loader brings a checkpoint's in their order as it loads them."""
    from vllm.model_executor.layers.fused_moe.oracle import int_wna16
    from vllm.model_executor.layers.quantization.moe_wna16 import MoeWNA16Method

    held = drawn("packed", 32)
    layer, method = torch.nn.Module(), object.__new__(MoeWNA16Method)
    method.quant_config = SimpleNamespace(
        weight_bits=4, group_size=32, bit8_pack_factor=2, has_zp=zeros, linear_quant_method="gptq",
        full_config={},
    )  # fmt: skip
    method.experts_cls, method.wna16_backend = int_wna16.TritonWNA16Experts, int_wna16.WNA16MoEBackend.TRITON
    method.moe, method.moe_quant_config = SimpleNamespace(w13_num_shards=2, is_act_and_mul=True), None
    layer.quant_method, layer.moe_config = method, SimpleNamespace(in_dtype=DTYPE)
    layer.hidden_size, layer.intermediate_size_per_partition = HIDDEN, WIDTH
    method.create_weights(layer, EXPERTS, HIDDEN, WIDTH, DTYPE, weight_loader=None)
    assert int4_backend(layer) == "int4 bytes"
    check_plain_bytes(int4_experts, layer, held, zeros)


def humming_layer(group: int = 128) -> tuple[Any, Drawn]:
    """A layer as Humming leaves it, by its published layout: its own code runs on a GPU alone."""
    held = drawn("gptq", group)
    layer = layer_of(held)  # tiles are Marlin's, and so are scales of several groups
    layer.quant_method.experts_cls = type("HummingIndexedExperts", (), {})
    config = SimpleNamespace(
        a_dtype="float16", b_dtype="uint4", weight_scale_group_size=group, is_fp_zero_point=False
    )
    layer.humming_configs = {"w13": config, "w2": config}
    layer.weight_schemas = {"w13": SimpleNamespace(hadamard_block_size=0)}
    return layer, held


def test_humming() -> None:
    layer, held = humming_layer()
    assert int4_backend(layer) == "int4 humming"
    weights = int4_experts(layer)
    assert weights is not None
    assert weights.format == "int4 g128, marlin_tile by humming"
    assert off(weights, held) == 0.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"a_dtype": "int8"}, "VLLM_HUMMING_INPUT_QUANT_CONFIG"),
        ({"b_dtype": "float8e4m3"}, "weights as float8e4m3"),
        ({"is_fp_zero_point": True}, "zero points that are no integers"),
    ],
)
def test_what_humming_keeps_otherwise_is_refused(changes: dict[str, Any], words: str) -> None:
    layer, _ = humming_layer()
    config = SimpleNamespace(**{**vars(layer.humming_configs["w13"]), **changes})
    layer.humming_configs = {"w13": config, "w2": config}
    code, said = refused(layer)
    assert (code, words in said) == ("quant.layout", True)


def test_rotated_weights_of_humming_are_refused() -> None:
    layer, _ = humming_layer()
    layer.weight_schemas = {"w13": SimpleNamespace(hadamard_block_size=64)}
    assert refused(layer) == ("quant.layout", "Humming keeps weights rotated")
    del layer.humming_configs  # as of releases before it was the default
    assert "does not say" in refused(layer)[1]
