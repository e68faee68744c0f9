"""What the start of vLLM proves and measures of paired layers, of models of few layers with random weights.

    python benchmarks/paired.py benchmarks/shapes/qwen3_next_80b benchmarks/shapes/glm4.5_air_tp2 --csv F
    python benchmarks/paired.py benchmarks/shapes/qwen3_next_80b --quant fp8-block --csv F

A row of the file is a size under a routing: the lower bound of stock over ours as the engine's own start took
it, on four layers in turn, at the layer without the engine's all-reduce. The cache of thresholds is not read.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from serving import ENVIRONMENT, draw_blocks, folder_of

COLUMNS = (
    *("model", "device", "quant", "layers", "tokens", "routing", "lower_bound", "threshold", "proof_seconds"),
    *("measure_seconds", "between", "ours_off", "stock_off", "commit", "vllm", "torch", "triton"),
)
ARGUMENTS: dict[str, Any] = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_batched_tokens": 512,
    "gpu_memory_utilization": 0.1,
    "kv_cache_memory_bytes": 1 << 30,
    "enable_prefix_caching": False,
    "gdn_prefill_backend": "triton",
}


def started(folder: Path) -> dict[str, Any]:
    """Start vLLM on a folder, end it, and return its record of the paired role."""
    from vllm import LLM

    import fse_patch
    from fse_patch.lab.vllm.verify_arm import shut_down

    llm = LLM(model=str(folder), **ARGUMENTS)
    roles = fse_patch.status()["vllm"]["roles"]
    shut_down(llm)
    if not roles:
        sys.exit(f"{folder}: not paired: the log has the reason")
    recorded: dict[str, Any] = roles[0]["paired"]
    return recorded


def main() -> None:
    """Start one model after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shapes", type=Path, nargs="+", help="folders with a config.json")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--quant", choices=("", "fp8-block"), default="", help="of Qwen3-Next's experts")
    parser.add_argument("--csv", type=Path, required=True, help="rows are appended as they are measured")
    parser.add_argument("--commit", default="")
    given = parser.parse_args()
    os.environ |= {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    os.environ |= {"FSE_PATCH_LAYOUT": "paired", "FSE_PATCH_MEASURE": "always"}
    import fse_patch

    fse_patch.apply("vllm")
    import torch
    import triton
    import vllm

    draw_blocks()
    new = not given.csv.exists()
    with given.csv.open("a", newline="") as file:
        rows = csv.writer(file)
        if new:
            rows.writerow(COLUMNS)
        for shape in given.shapes:
            with tempfile.TemporaryDirectory() as place:
                told = started(folder_of(shape, given.layers, given.quant, Path(place)))
            proof = told["proof"]
            head = [shape.resolve().name, torch.cuda.get_device_name(), given.quant or "none", given.layers]
            seconds = [told["threshold"], proof["seconds"], told["measure_seconds"]]
            off = [f"{proof[name]:.5f}" for name in ("between", "ours", "stock")]
            tail = [given.commit, vllm.__version__, torch.__version__, triton.__version__]
            for measured, bound in told["bounds"].items():
                rows.writerow([*head, *measured.split(" "), bound, *seconds, *off, *tail])
            file.flush()
            print(*head, told, flush=True)


if __name__ == "__main__":
    main()
