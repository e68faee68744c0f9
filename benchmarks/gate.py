"""The gate of an unfused shared expert, one launch against the engine's three.

    python benchmarks/gate.py --out gate.csv [--commit HASH]

sigmoid(x·w)·y in bfloat16 as vLLM computes it (linear, sigmoid, product), against `gated_mlp`, in CUDA graphs
of several calls on tensors of their own, in turn. The floor is the time in which x and y are read and the
result is written.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

from fse_patch.fusion_core.kernels.gated_mlp import gated_mlp, reference
from fse_patch.lab.timing import H200_BYTES_PER_SECOND, capture, in_turn, is_quiet, ratio

HIDDEN = (2048, 4096)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
ATTEMPTS, ROUNDS = 4, 7
LIMIT = 1e-2


def stock(x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The three kernels of vLLM's Qwen2MoeMLP."""
    return functional.sigmoid(functional.linear(x, gate)) * y


def measure(hidden: int, tokens: int, count: int) -> dict[str, float | int]:
    """A row, times in microseconds a call."""
    draw = torch.Generator("cuda").manual_seed(tokens)

    def random(rows: int, std: float) -> torch.Tensor:
        return torch.randn(rows, hidden, device="cuda", generator=draw).mul_(std).to(torch.bfloat16)

    sets = [(random(tokens, 1.0), random(1, 0.02), random(tokens, 1.0)) for _ in range(count)]
    wanted = reference(*sets[0])
    off = {
        name: float((kernel(*sets[0]).double() - wanted).norm() / wanted.norm())
        for name, kernel in (("stock", stock), ("kernel", gated_mlp))
    }
    if not off["kernel"] < LIMIT:
        raise SystemExit(f"H {hidden}, {tokens} tokens: off float64 by {off['kernel']:.3g}")

    def run(kernel: Callable[..., torch.Tensor]) -> Callable[[], object]:
        return lambda: [kernel(*one) for one in sets]

    graphs = {"stock": capture(run(stock)), "again": capture(run(stock)), "kernel": capture(run(gated_mlp))}
    for _ in range(ATTEMPTS):
        seconds = in_turn(graphs, ROUNDS)
        again = ratio(seconds["stock"], seconds["again"])
        if is_quiet(again):
            break
    found = ratio(seconds["stock"], seconds["kernel"])
    ours = statistics.median(seconds["kernel"]) / count
    floor = 3 * tokens * hidden * 2 / H200_BYTES_PER_SECOND
    return {
        "sets": count,
        "hidden": hidden,
        "tokens": tokens,
        "stock_us": statistics.median(seconds["stock"]) / count * 1e6,
        "again": again.median,
        "kernel_us": ours * 1e6,
        "ratio": found.median,
        "lower": found.lower,
        "floor_us": floor * 1e6,
        "of_floor": floor / ours,
        "stock_off": off["stock"],
        "kernel_off": off["kernel"],
    }


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default="")
    parser.add_argument("--sets", type=int, default=8, help="of tensors in a graph; 8 are more than a cache")
    args = parser.parse_args()
    head = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": args.commit}
    rows = []
    for hidden in HIDDEN:
        for tokens in TOKENS:
            rows.append(measure(hidden, tokens, args.sets))
            print(" ".join(f"{name}={value:.4g}" for name, value in rows[-1].items()), flush=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*head, *rows[0]])
        writer.writeheader()
        writer.writerows(
            {**head, **{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}}
            for row in rows
        )


if __name__ == "__main__":
    main()
