"""Stock against every mode of the fused block, on this device and the installed engine."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ..adapters import tuned_configs
from ..adapters.patching import guards, ledger
from ..errors import FsePatchError, RefusedError
from ..fusion_core.decision.decide import decide_roles
from ..fusion_core.decision.outcome import Stock
from ..fusion_core.decision.policy_file import load_policy
from ..fusion_core.forward.mode_registry import MODES, Mode
from ..fusion_core.kernels.routing_reference import append_shared_slots, route
from ..patches import ENGINES
from ..version import __version__
from . import csv_file, tune
from .timing import capture, floor_seconds, in_turn, is_quiet, ratio
from .verify import Progress

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
# A row in which stock was not equal to itself is measured again.
ATTEMPTS = 4
# Times as many rounds where they may decide whether a mode is as fast as stock.
MORE = 4
SEEDS, ERROR_TOKENS, DRAWN = 5, 8, 256
# Margin of a choice of experts that rounding of the logits does not change, in units of their size.
CLEAR = 0.005
CONTROL = 0.5
# Where an engine's blocks are built, as a class `Pair`: stock, fused, native (stock has the slots),
# fused_role, situation, forward_context.
BLOCKS = "fse_patch.lab.{engine}.blocks"
Pair = Any
TABLES = ("stock_table", "fused_table")
# Of a row of `measure`; those of a mode that does not run stay empty.
COLUMNS = [
    *("tokens", "stock_us", "again", "valid", "floor_us"),
    *(f"{mode}_{what}" for mode in MODES for what in ("us", "ratio", "lower")),
]


def open_pair(folder: Path, engine: str, layers: int, quant: str = "") -> Pair:
    """Build blocks for the model that a config.json describes.

    Args:
        quant: measure as if the experts were in "fp8-block" or "fp8-tensor"; "": as the folder says.

    Raises:
        RefusedError: the model does not fuse.
        FsePatchError: this engine or machine cannot be measured.
    """
    if engine not in ENGINES:
        raise FsePatchError(f"{engine!r}: unknown engine; use one of {', '.join(ENGINES)}")
    if not torch.cuda.is_available():
        raise FsePatchError("no CUDA device here; nothing to measure")
    decision = decide_roles(folder, engine, load_policy(None))["main"]
    if isinstance(decision, Stock):
        raise RefusedError(decision.reason.code, decision.reason.detail)
    if (count := len(decision.moe.layers)) < layers:
        raise FsePatchError(f"{folder}: {count} MoE layers; give --layers that many")
    from .. import apply

    apply(engine)
    return importlib.import_module(BLOCKS.format(engine=engine)).Pair(folder, decision, layers, quant=quant)


def measure(
    pair: Pair, tokens: Sequence[int], rounds: int, progress: Progress = lambda _: None
) -> list[dict[str, Any]]:
    """Return a row for each number of tokens; times in microseconds a block.

    Keys: tokens, stock_us, again (stock over stock: a ratio), valid, floor_us; of each mode <mode>_us,
    <mode>_ratio (stock over it, median) and <mode>_lower (of its 95 % bootstrap interval).
    """
    rows = []
    # The largest first: the engine's workspace must not grow under a captured graph.
    for count in sorted(tokens, reverse=True):
        row = _measure(pair, count, rounds)
        for _ in range(ATTEMPTS - 1):
            if row["valid"] and not tune.is_open(row):
                break
            progress(f"{line(row)}; once more")
            row = _measure(pair, count, rounds * (MORE if tune.is_open(row) else 1))
        progress(line(row))
        rows.append(row)
    return rows[::-1]


def modes_for(pair: Pair, tokens: int) -> list[Mode]:
    """Return the modes worth measuring for so many tokens; layers without executions have one."""
    if any(layer.execution is None for layer in pair.fused_role.layers.values()):
        return ["fused"]
    slots = pair.layout.num_shared_slots
    return [mode.name for mode in MODES.values() if mode.runs(slots, tokens)]


def _measure(pair: Pair, tokens: int, rounds: int) -> dict[str, Any]:
    layout, layers = pair.layout, len(pair.stock)
    draw = torch.Generator("cuda").manual_seed(tokens)
    states = [
        torch.randn(tokens, layout.hidden_size, device="cuda", dtype=torch.bfloat16, generator=draw)
        for _ in range(layers)
    ]

    def run(blocks: list[Any], mode: Mode | None = None) -> Callable[[], object]:
        def call() -> object:
            with ExitStack() as stack:
                for layer in pair.fused_role.layers.values():
                    if mode is not None:
                        stack.enter_context(layer.forced(mode))
                return [block(state) for block, state in zip(blocks, states, strict=True)]

        return call

    calls = {"stock": run(pair.stock), "again": run(pair.stock)}
    calls |= {mode: run(pair.fused, mode) for mode in modes_for(pair, tokens)}
    with pair.forward_context(tokens):
        for call in calls.values():
            call()
        graphs = {name: capture(call) for name, call in calls.items()}
        seconds = in_turn(graphs, rounds)
    stock, again = seconds.pop("stock"), seconds.pop("again")
    self_ratio = ratio(stock, again)
    gates = layout.num_routed + (pair.decision.moe.shared_weight == "sigmoid_gate")
    row: dict[str, Any] = {
        "tokens": tokens,
        "stock_us": statistics.median(stock) / layers * 1e6,
        "again": self_ratio.median,
        "valid": is_quiet(self_ratio),
        # Gates stay in 16 bit.
        "floor_us": floor_seconds(layout, 1, tokens, gates * 2 // pair.itemsize, pair.itemsize) * 1e6,
    }
    for mode, values in seconds.items():
        speed = ratio(stock, values)
        row |= {
            f"{mode}_us": statistics.median(values) / layers * 1e6,
            f"{mode}_ratio": speed.median,
            f"{mode}_lower": speed.lower,
        }
    return row


def line(row: dict[str, Any]) -> str:
    """Return a row in words."""
    modes = [m for m in MODES if f"{m}_us" in row]
    parts = [f"{m} {row[f'{m}_us']:.1f} ({row[f'{m}_ratio']:.3f}x, >{row[f'{m}_lower']:.3f})" for m in modes]
    quiet = "" if row["valid"] else " NOT QUIET"
    return (
        f"M={row['tokens']}: stock {row['stock_us']:.1f} us (again {row['again']:.4f}{quiet}), "
        f"{', '.join(parts)}, floor {row['floor_us']:.1f}"
    )


def errors(pair: Pair, seeds: int = SEEDS) -> dict[str, Any]:
    """Return RMS errors against float64 of stock and of every mode, over tokens whose choice is clear.

    Keys: tokens; stock, each mode and "control" (a mode with half the shared weight); an entry for each seed.
    """
    off: dict[str, Any] = {"tokens": [], "stock": [], "control": []}
    stock, fused = pair.stock[0], pair.fused[0]
    layer = pair.fused_role.layers[min(pair.fused_role.layers)]
    for seed in range(seeds):
        states, expected = reference(pair, seed)
        off["tokens"].append(len(states))
        with pair.forward_context(len(states)):
            off["stock"].append(_off(stock(states.clone()), expected))
            modes = modes_for(pair, len(states))
            for mode in modes:
                with layer.forced(mode):
                    off.setdefault(mode, []).append(_off(fused(states.clone()), expected))
            with layer.forced(modes[-1]), layer.weighted(CONTROL):
                off["control"].append(_off(fused(states.clone()), expected))
    return off


def reference(pair: Pair, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return states [tokens, H] and the first stock block's output for them, in bfloat16 and in float64."""
    routing, layout, block = pair.decision.moe.routing, pair.layout, pair.stock[0]
    draw = torch.Generator("cuda").manual_seed(1000 + seed)
    drawn = torch.randn(DRAWN, layout.hidden_size, device="cuda", dtype=torch.bfloat16, generator=draw)
    logits = drawn.double() @ block.gate.weight.data.double().T
    bias = getattr(block.gate, "e_score_correction_bias", None)
    scores = logits if bias is None else logits.sigmoid() + bias.data.double()
    best = scores.topk(layout.top_k + 1, dim=1).values
    margin = (best[:, -2] - best[:, -1]) / scores.abs().amax(1)
    kept = margin.topk(ERROR_TOKENS).indices
    if float(margin[kept].min()) < CLEAR:
        raise FsePatchError("no tokens whose choice of experts is clear; another seed is needed")
    states, logits = drawn[kept], logits[kept]
    weights, ids = route(logits, layout.top_k, routing, None if bias is None else bias.data.double())
    share: torch.Tensor | float = 1.0
    if (gate_name := pair.fused_role.start.naming.family.shared_gate) is not None:
        gate = getattr(block, gate_name)
        share = (states.double() @ gate.weight.data.double().T).sigmoid()
    weights, ids = append_shared_slots(weights, ids, layout.shared_slots, share)
    out = torch.zeros_like(states, dtype=torch.float64)
    for token in range(len(states)):
        for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
            one, up = (pair.exact(expert, "w13") @ states[token].double()).chunk(2)
            inner = torch.nn.functional.silu(one) * up
            out[token] += weight * (pair.exact(expert, "w2") @ inner)
    return states, out


def _off(output: torch.Tensor, expected: torch.Tensor) -> float:
    error = float((output.double() - expected).norm() / expected.norm())
    return error if error == error else float("inf")


def versions(engine: str) -> dict[str, str]:
    """Return the versions of everything that a measurement depends on."""
    import triton

    return {
        "fse_patch": __version__,
        engine: guards.engine_version(ledger.load(engine)),
        "torch": str(torch.__version__),
        "triton": str(triton.__version__),
    }


def tuned_tables(pair: Pair) -> dict[str, str]:
    """Return by which tuned tables the GEMM ran, as of `tuned_configs.LOOKED_UP`; "": by none.

    Keys: `TABLES`.

    Raises:
        FsePatchError: stock has one and fused has none, which is not what the engine would do.
    """
    layout = pair.layout
    stock, fused = (
        tuned_configs.LOOKED_UP.get(experts, "")
        for experts in (layout.num_experts if pair.native else layout.num_routed, layout.num_experts)
    )
    if stock not in ("", tuned_configs.NONE) and fused in ("", tuned_configs.NONE):
        raise FsePatchError(f"fused ran without the table of stock ({stock}), unlike a served engine")
    return dict(zip(TABLES, (stock, fused), strict=True))


def csv_columns(engine: str) -> list[str]:
    """Return the columns of what `write_csv` writes."""
    return ["shape", "device", "backend", *TABLES, "commit", *versions(engine), *COLUMNS]


def write_csv(path: Path, name: str, pair: Pair, rows: Sequence[dict[str, Any]], commit: str) -> None:
    """Append the rows of one shape.

    Raises:
        FsePatchError: the file cannot be written, or has other columns, as those of another engine.
    """
    head = {
        "shape": name,
        "device": pair.situation.device,
        "backend": pair.situation.backend,
        **tuned_tables(pair),
        "commit": commit,
        **versions(pair.situation.engine),
    }
    csv_file.append(path, csv_columns(pair.situation.engine), [{**head, **row} for row in rows])
