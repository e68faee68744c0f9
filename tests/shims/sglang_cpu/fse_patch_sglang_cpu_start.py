"""Tests only: what SGLang needs in every process to run on a CPU without its kernel package.

A .pth line of the environment imports this at start-up (ci/envs.py), so that no variable has to be set by
hand. Whatever is set already stays.
"""

import os

DEFAULTS = {
    "SGLANG_USE_CPU_ENGINE": "1",
    # The gate of the unfused shared expert is a Triton kernel, on the CPU too.
    "TRITON_INTERPRET": "1",
    # Compiling the grouped top-k takes longer than everything else together.
    "TORCHDYNAMO_DISABLE": "1",
    # The default keeps the convolution's state in bfloat16, whatever the model's dtype.
    "SGLANG_MAMBA_CONV_DTYPE": "float32",
}
for name, value in DEFAULTS.items():
    os.environ.setdefault(name, value)
