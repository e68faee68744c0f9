"""The project's packer of 4-bit checkpoints against public ones: of vLLM and of compressed-tensors."""

from __future__ import annotations

import torch
from checkpoints import int4

N, K, GROUP = 64, 256, 128


def held(zeros: bool) -> int4.Numbers:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(1)) * 0.05
    return int4.rounded(weight, GROUP, zeros, torch.float16)


def test_gptq() -> None:
    from vllm.model_executor.layers.quantization.utils import quant_utils

    drawn = held(False)
    tensors = int4.gptq(drawn)
    public = quant_utils.gptq_pack(drawn.numbers.t().int(), 4, K, N)
    assert torch.equal(tensors["qweight"], public)
    # The control: rows of the matrix in another order.
    assert not torch.equal(int4.gptq(held(True))["qweight"], public)
    # Of symmetric weights GPTQ stores a zero point of 7, to which readers add one.
    assert set(tensors["qzeros"].unique().tolist()) == {0x77777777}
    assert torch.equal(tensors["g_idx"], torch.arange(K, dtype=torch.int32) // GROUP)


def test_awq() -> None:
    from vllm.model_executor.layers.quantization.utils import quant_utils

    drawn = held(True)
    tensors = int4.awq(drawn)
    assert torch.equal(tensors["qweight"], quant_utils.awq_pack(drawn.numbers.t().int(), 4, K, N))
    points = quant_utils.awq_pack(drawn.zeros.t().int().contiguous(), 4, K // GROUP, N)
    assert torch.equal(tensors["qzeros"], points)
    assert not torch.equal(int4.words(drawn.numbers.t()), tensors["qweight"])


def test_packed() -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    drawn = held(False)
    signed = drawn.numbers.to(torch.int8) - 8
    public = pack_to_int32(signed, 4)
    assert torch.equal(int4.packed(drawn)["weight_packed"], public)
    assert not torch.equal(int4.packed(held(True))["weight_packed"], public)


def test_rounding_is_near() -> None:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(1)) * 0.05
    for zeros in (False, True):
        off = held(zeros).dense() - weight
        assert float(off.norm() / weight.norm()) < 0.12
