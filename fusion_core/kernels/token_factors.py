"""For each token a power of two by which its states fit float16: one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import begin, options


def reference(states: torch.Tensor) -> torch.Tensor:
    """Compute what `token_factors` computes, in torch."""
    largest = states.float().abs().nan_to_num(0.0, float("inf")).amax(1)
    _, exponent = torch.frexp(largest)
    fine = (largest >= 2.0**-113) & largest.isfinite()
    return torch.where(fine, torch.exp2((14 - exponent).double()), 1.0).float()


def token_factors(states: torch.Tensor) -> torch.Tensor:
    """Return for each token a power of two by which its largest state fits float16: [num_tokens] float32."""
    factors = torch.empty(len(states), dtype=torch.float32, device=states.device)
    _factors[(len(states),)](
        states,
        factors,
        HIDDEN=states.shape[1],
        HIDDEN_P2=triton.next_power_of_2(states.shape[1]),
        num_warps=4,
        **options(states),
    )
    return factors


@triton.jit
def _factors(x_ptr, factors_ptr, HIDDEN: tl.constexpr, HIDDEN_P2: tl.constexpr, PDL: tl.constexpr):
    begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, HIDDEN_P2)
    x = tl.load(x_ptr + token * HIDDEN + offs_k, mask=offs_k < HIDDEN, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), 0)
    # Of 2^e <= largest < 2^(e + 1) the exponent alone: the product is below 2^14. 1 for 0, infinity and NaN.
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    factor = ((254 + 13 - exponent) << 23).to(tl.float32, bitcast=True)
    fine = (exponent > 13) & (exponent < 255)
    tl.store(factors_ptr + token, tl.where(fine, factor, 1.0))
