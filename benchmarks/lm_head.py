"""The LM head in 8 bits against the engine's own, a linear layer in bfloat16.

    python benchmarks/lm_head.py --out lm_head.csv [--commit HASH]

In CUDA graphs, in turn; a head is larger than the cache of a device. The floor is the time in which values
and scales are read. Rows are checked as at the start of a server.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from pathlib import Path

import torch
from torch.nn import functional

from fse_patch.fusion_core.kernels.head_int8 import head_logits
from fse_patch.fusion_core.proof.head import row_fault
from fse_patch.fusion_core.quant.int8_groups import quantised
from fse_patch.lab.timing import H200_BYTES_PER_SECOND, capture, in_turn, is_quiet, ratio

# Vocabulary and hidden size; of a process, where tensor parallelism shares the rows.
SHAPES = {
    "qwen3_next_80b": (151936, 2048),
    "qwen3.5_35b": (248320, 2048),
    "qwen3.5_35b_tp4": (62080, 2048),
    "qwen3.5_397b_tp8": (31040, 4096),
    "glm4.5_air": (151552, 4096),
    "glm4.5": (151552, 5120),
}
TOKENS = (1, 2, 4, 8, 16)
ATTEMPTS, ROUNDS = 4, 7


def measure(name: str, rows: int, hidden: int) -> list[dict[str, object]]:
    """Return a row for each number of tokens, times in microseconds a call."""
    draw = torch.Generator("cuda").manual_seed(rows)
    weight = torch.randn(rows, hidden, device="cuda", generator=draw).mul_(0.02).bfloat16()
    held, made = quantised(weight), []
    for tokens in TOKENS:
        x = torch.randn(tokens, hidden, device="cuda", generator=draw).bfloat16()
        ours, stock = head_logits(x, held.values, held.scales), functional.linear(x, weight)
        if (fault := row_fault(x, ours, stock, held.scales)) is not None:
            raise SystemExit(f"{name}, {tokens} tokens: {fault}")
        graphs = {
            "stock": capture(lambda x=x: functional.linear(x, weight)),
            "again": capture(lambda x=x: functional.linear(x, weight)),
            "ours": capture(lambda x=x: head_logits(x, held.values, held.scales)),
        }
        for _ in range(ATTEMPTS):
            seconds = in_turn(graphs, ROUNDS)
            again = ratio(seconds["stock"], seconds["again"])
            if is_quiet(again):
                break
        found = ratio(seconds["stock"], seconds["ours"])
        took, floor = statistics.median(seconds["ours"]), held.nbytes / H200_BYTES_PER_SECOND
        made.append(
            {
                "head": name,
                "rows": rows,
                "hidden": hidden,
                "tokens": tokens,
                "stock_us": statistics.median(seconds["stock"]) * 1e6,
                "again": again.median,
                "ours_us": took * 1e6,
                "ratio": found.median,
                "lower": found.lower,
                "floor_us": floor * 1e6,
                "of_floor": floor / took,
            }
        )
    return made


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default="")
    args = parser.parse_args()
    head = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": args.commit}
    rows: list[dict[str, object]] = []
    for name, shape in SHAPES.items():
        for row in measure(name, *shape):
            rows.append({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()})
            print(" ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*head, *rows[0]])
        writer.writeheader()
        writer.writerows({**head, **row} for row in rows)


if __name__ == "__main__":
    main()
