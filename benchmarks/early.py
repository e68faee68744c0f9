"""What the pass of few tokens gains if weights of w2 are asked for while w13 runs.

    python benchmarks/early.py --out early.csv [--commit HASH] [--tokens 1,2,4]

Routing and mode `small` of several layers with random weights, an ordinary kernel between them, in CUDA
graphs, in turn: as the tiles are today, with w2 asked into the L2 cache by w13's programs (`ask`), and with
the first slots of w2 loaded before the wait for w13 (`early`). Results must be the same bits.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from fse_patch.fusion_core.decision.outcome import RoutingSpec
from fse_patch.fusion_core.kernels import experts, experts_fp8
from fse_patch.fusion_core.kernels.expert_weights import ExpertWeights, Scales
from fse_patch.fusion_core.kernels.route import route
from fse_patch.fusion_core.kernels.router_logits import router_logits
from fse_patch.lab.timing import capture, in_turn, ratio

# H, I, E, k of layers as one device holds them.
SHAPES = {
    "qwen3_next_80b": (2048, 512, 512, 10),
    "qwen3.5_397b_tp8": (4096, 128, 512, 10),
    "glm4.5_air_tp2": (4096, 704, 128, 8),
    "qwen1.5_moe_a2.7b": (2048, 1408, 60, 4),
}
# Whether w13 asks, and slots of w2 that come early.
ARMS = [(ask, early) for ask in (False, True) for early in (0, 3, 6, 8, 12)]
ROUNDS = 7
BLOCK = 128
SPEC = RoutingSpec("softmax", True)


def weights_of(shape: tuple[int, ...], quant: str) -> ExpertWeights:
    """Random weights, the shared expert's in the last slot; of FP8 all bytes are numbers."""
    hidden, width, count, _ = shape
    total = count + 1

    def plain(*size: int) -> torch.Tensor:
        return torch.randn(size, device="cuda", dtype=torch.bfloat16).mul_(size[-1] ** -0.5)

    def eight(*size: int) -> torch.Tensor:
        return torch.randint(0, 120, size, device="cuda", dtype=torch.uint8).view(torch.float8_e4m3fn)

    if not quant:
        return ExpertWeights(plain(total, 2 * width, hidden), plain(total, hidden, width))

    def scale(rows: int, columns: int) -> torch.Tensor:
        return torch.rand(total, -(-rows // BLOCK), -(-columns // BLOCK), device="cuda").mul_(1e-4)

    # Blocks do not go over the end of w1.
    scales = Scales(scale(-(-width // BLOCK) * 2 * BLOCK, hidden), scale(hidden, width), (BLOCK, BLOCK))
    return ExpertWeights(eight(total, 2 * width, hidden), eight(total, hidden, width), scales)


@contextmanager
def tiles(kernels: Any, ask: bool, early: int) -> Iterator[None]:
    """Run with tiles that end so."""
    w13, w2 = kernels.w13_tile, kernels.w2_tile
    with (
        patch.object(kernels, "w13_tile", lambda *given: (*w13(*given)[:-1], ask)),
        patch.object(kernels, "w2_tile", lambda *given: (*w2(*given)[:-1], early)),
    ):
        yield


def runner(
    kernels: Any, layers: list[tuple[ExpertWeights, torch.Tensor]], states: torch.Tensor, top_k: int
) -> Callable[[], torch.Tensor]:
    """Return what runs all layers one after the other."""

    def run() -> torch.Tensor:
        x = states
        for weights, gate in layers:
            first = weights.count - 1
            chosen = route(router_logits(x, gate), top_k, range(first, first + 1), SPEC)
            out = kernels.small_experts(x, weights, *chosen)
            x = states + out * 1e-6  # an ordinary kernel, and nearly the same routing in every arm
        return out

    return run


def measure(name: str, quant: str, tokens: int, count: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each arm, times in microseconds a layer."""
    shape = SHAPES[name]
    kernels = experts_fp8 if quant else experts
    gates = [torch.randn(shape[2] + 1, shape[0], device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    layers = [(weights_of(shape, quant), gate) for gate in gates]
    states = torch.randn(tokens, shape[0], device="cuda", dtype=torch.bfloat16)
    run = runner(kernels, layers, states, shape[3])
    graphs, first = {}, run()
    for arm in ARMS:
        with tiles(kernels, *arm):
            graphs[str(arm)] = capture(run)
            if not torch.equal(run(), first):
                raise SystemExit(f"{name} {quant}, {tokens} tokens: {arm} gives other bits")
    seconds = in_turn(graphs, ROUNDS)
    base = seconds[str(ARMS[0])]
    for arm in ARMS:
        found = ratio(base, seconds[str(arm)])
        yield {
            "shape": name,
            "quant": quant or "none",
            "tokens": tokens,
            "ask": int(arm[0]),
            "early": arm[1],
            "us": round(statistics.median(seconds[str(arm)]) / count * 1e6, 2),
            "ratio": round(found.median, 4),
            "lower": round(found.lower, 4),
        }


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="rows are appended as they are measured")
    parser.add_argument("--commit", default="")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--quants", default="fp8,")
    parser.add_argument("--tokens", default="1,2,4")
    parser.add_argument("--layers", type=int, default=6)
    args = parser.parse_args()
    head = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": args.commit}
    with args.out.open("a", newline="") as file:
        for name in args.shapes.split(","):
            for quant in args.quants.split(","):
                for tokens in map(int, args.tokens.split(",")):
                    for row in measure(name, quant, tokens, args.layers):
                        writer = csv.DictWriter(file, [*head, *row])
                        if not file.tell():
                            writer.writeheader()
                        writer.writerow({**head, **row})
                        file.flush()
                        print(" ".join(map(str, row.values())), flush=True)


if __name__ == "__main__":
    main()
