"""Overlap of kernels that follow each other: programmatic dependent launch, on NVIDIA GPUs from Hopper on.

A kernel launched so is set up while the one before it still runs. It calls `begin` before it touches memory:
that waits until all that was launched before has ended and is visible, and then lets the next one be set up.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

HOPPER = (9, 0)


def options(tensor: torch.Tensor) -> dict[str, Any]:
    """Return the launch arguments on the tensor's device, for a kernel with ``PDL`` that calls `begin`."""
    if tensor.is_cuda and _supported(tensor.device):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@cache
def _supported(device: torch.device) -> bool:
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < HOPPER:
        return False
    from triton.backends.nvidia.compiler import CUDAOptions

    return hasattr(CUDAOptions, "launch_pdl")  # older releases of Triton refuse the argument


@triton.jit
def begin(PDL: tl.constexpr):
    """Wait until all that was launched before is there, then let the next kernel be set up."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def dot(left, right, acc, WIDE: tl.constexpr):
    """Multiply matrices in 16 bit into float32; ``WIDE``: as Triton's interpreter needs it for bfloat16."""
    if WIDE:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(left, right, acc)
