"""Which tiles are fastest for the pass of few tokens: one kernel's changed at a time, against those of today.

    python benchmarks/tiles.py --out tiles.csv [--shapes A,B] [--quants fp8,] [--tokens 1,2,4,8]

Routing and experts of several layers with random weights, an ordinary kernel between them, in CUDA graphs, in
turn. Up to 8 tokens mode `small`, and `once` from 8 on. An arm of w2 has its number of slots that are loaded
before the wait for w13 too.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from fse_patch.fusion_core.decision.outcome import RoutingSpec
from fse_patch.fusion_core.kernels import experts, experts_fp8, once_tiles
from fse_patch.fusion_core.kernels.expert_weights import ExpertWeights, Scales
from fse_patch.fusion_core.kernels.experts_once import experts_once
from fse_patch.fusion_core.kernels.route import route
from fse_patch.fusion_core.kernels.router_logits import router_logits
from fse_patch.lab.timing import capture, in_turn, ratio

# H, I, E, k of layers as one device holds them.
SHAPES = {
    "qwen3_next_80b": (2048, 512, 512, 10),
    "qwen3.5_397b_tp8": (4096, 128, 512, 10),
    "glm4.5_air": (4096, 1408, 128, 8),
    "glm4.5_air_tp2": (4096, 704, 128, 8),
    "qwen1.5_moe_a2.7b": (2048, 1408, 60, 4),
}
W13 = [
    *((4, 1024, 2), (2, 1024, 1), (2, 1024, 2), (2, 2048, 2), (1, 2048, 2), (4, 512, 1), (4, 1024, 4)),
    *((4, 2048, 4), (8, 512, 2), (8, 1024, 4), (8, 2048, 8)),
]
W2 = [
    *((2, 256, 1, True), (1, 256, 1, True), (1, 512, 1, True), (2, 128, 1, True), (4, 128, 1, True)),
    *((2, 512, 2, True), (4, 256, 2, True), (2, 512, 1, True), (2, 256, 1, False), (4, 128, 1, False)),
]
W13_FP8 = [
    *((2, 64, 1, 16), (1, 64, 1, 16), (4, 64, 1, 16), (2, 32, 1, 16), (4, 32, 1, 16), (1, 128, 1, 16)),
    *((1, 128, 2, 16), (2, 128, 2, 16), (4, 64, 2, 16), (4, 128, 4, 16), (8, 64, 4, 16), (2, 128, 1, 8)),
]
W2_FP8 = [
    *(
        (1, 64, 1, 8),
        (2, 32, 1, 8),
        (2, 64, 1, 8),
        (4, 16, 1, 8),
        (4, 32, 1, 8),
        (1, 32, 1, 16),
        (2, 32, 1, 16),
    ),
    *((4, 64, 2, 8), (4, 32, 2, 8)),
]
EARLY = (0, 3, experts.MANY)
# What is changed in the tiles of `once`.
ONCE_W13: list[dict[str, int]] = [
    *({"blocks": 4}, {"blocks": 8}, {"blocks": 12}, {"stages": 2}, {"stages": 4}, {"stages": 5}),
    *({"warps": 2, "blocks": 4}, {"warps": 4, "blocks": 2}, {"depth": 64}, {"depth": 256}),
]
ONCE_W2: list[dict[str, int]] = [
    *({"stages": 4}, {"stages": 6}, {"stages": 9}, {"experts": 1}, {"experts": 4}, {"experts": 8}),
    *({"parts": 1}, {"parts": 2}, {"warps": 2}, {"depth": 64}, {"rows": 32}),
]
ROUNDS = 7
BLOCK = 128
SMALL_UP_TO = 8
SPEC = RoutingSpec("softmax", True)
Arm = tuple[str, Any]
TODAY: Arm = ("today", "")


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


def arms(tokens: int, quant: str) -> list[Arm]:
    """Return kernel and tile of each arm."""
    if tokens > SMALL_UP_TO:
        return [TODAY, *(("w13", one) for one in ONCE_W13), *(("w2", one) for one in ONCE_W2)]
    first, second = (W13_FP8, W2_FP8) if quant else (W13, W2)
    return [
        TODAY,
        *(("w13", tile) for tile in first),
        *(("w2", (tile, early)) for tile in second for early in EARLY if early == 0 or quant or tile[3]),
    ]


def changed(kernels: Any, arm: Arm, once: bool) -> ExitStack:
    """Return what runs with the tile of an arm."""
    name, tile = arm
    stack = ExitStack()
    if name == "today":
        return stack
    if once:
        before = getattr(once_tiles, f"{name}_tile")
        after = lambda *given: replace(before(*given), **tile)  # noqa: E731
        stack.enter_context(patch.object(once_tiles, f"{name}_tile", after))
    elif name == "w13":
        stack.enter_context(patch.object(kernels, "w13_tile", lambda *_: tile))
    else:
        stack.enter_context(patch.object(kernels, "w2_tile", lambda *_: tile[0]))
        stack.enter_context(patch.object(kernels, "early_slots", lambda *_: tile[1]))
    return stack


def runner(
    run_experts: Callable[..., torch.Tensor],
    layers: list[tuple[ExpertWeights, torch.Tensor]],
    states: torch.Tensor,
    top_k: int,
) -> Callable[[], torch.Tensor]:
    """Return what runs all layers one after the other."""

    def run() -> torch.Tensor:
        x = states
        for weights, gate in layers:
            first = weights.count - 1
            chosen = route(router_logits(x, gate), top_k, range(first, first + 1), SPEC)
            out = run_experts(x, weights, *chosen)
            x = states + out * 1e-6  # an ordinary kernel, and nearly the same routing in every arm
        return out

    return run


def measure(name: str, quant: str, tokens: int, count: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each arm that runs, times in microseconds a layer."""
    shape = SHAPES[name]
    kernels: Any = experts_fp8 if quant else experts
    once = tokens > SMALL_UP_TO
    gates = [torch.randn(shape[2] + 1, shape[0], device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    layers = [(weights_of(shape, quant), gate) for gate in gates]
    states = torch.randn(tokens, shape[0], device="cuda", dtype=torch.bfloat16)
    run = runner(experts_once if once else kernels.small_experts, layers, states, shape[3])
    graphs = {}
    for arm in arms(tokens, quant):
        with changed(kernels, arm, once):
            try:
                graphs[arm[0], str(arm[1])] = capture(run)
            except Exception as fault:  # a tile that does not fit this device
                print(name, quant, tokens, arm, type(fault).__name__, str(fault)[:100], flush=True)
    seconds = in_turn(graphs, ROUNDS)
    base = seconds[TODAY]
    for (kernel, tile), some in seconds.items():
        against = ratio(base, some)
        yield {
            "shape": name,
            "quant": quant or "none",
            "tokens": tokens,
            "kernel": kernel,
            "tile": tile,
            "us": round(statistics.median(some) / count * 1e6, 2),
            "ratio": round(against.median, 4),
            "lower": round(against.lower, 4),
        }


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="rows are appended as they are measured")
    parser.add_argument("--commit", default="")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--quants", default="fp8,")
    parser.add_argument("--tokens", default="1,2,4,8")
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
