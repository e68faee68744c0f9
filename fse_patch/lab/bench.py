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
from ..fusion_core.kernels.routing_reference import append_shared_slots
from ..patches import ENGINES
from ..version import __version__
from . import routings, tune
from .arm_process import Progress
from .kept_rows import COLUMNS, TABLES, KeptRows
from .timing import capture, floor_seconds, in_turn, is_quiet, ratio

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
    pair: Pair,
    tokens: Sequence[int],
    names: Sequence[str],
    rounds: int,
    kept: KeptRows,
    progress: Progress = lambda _: None,
) -> list[dict[str, Any]]:
    """Return a row for each number of tokens under each routing; times in microseconds a block.

    Keys: tokens, routing, stock_us, again (stock over stock: a ratio), valid, floor_us, those of `TABLES`;
    of each mode <mode>_us, <mode>_ratio (stock over it, median) and <mode>_lower (of its 95 % interval).

    Args:
        names: routings, of `routings.ROUTINGS`; with one token `EVEN` alone is measured.
        kept: rows in it are not measured again, and the others are added when those of their number of tokens
            are decided.
    """
    rows = []
    # The largest first: the engine's workspace must not grow under a captured graph.
    for count in sorted(tokens, reverse=True):
        rows.append(_decided(pair, count, routings.for_tokens(names, count), rounds, kept, progress))
    return [row for group in rows[::-1] for row in group]


def _decided(
    pair: Pair, tokens: int, names: Sequence[str], rounds: int, kept: KeptRows, progress: Progress
) -> list[dict[str, Any]]:
    """Return the rows of one number of tokens, measured again while they leave something open."""
    found = {name: kept.find(tokens, name) for name in names}
    fresh = [name for name, row in found.items() if row is None]
    group = {name: row or _measure(pair, tokens, name, rounds) for name, row in found.items()}
    for _ in range(ATTEMPTS - 1):
        is_open = tune.is_open([*group.values()])
        again = [name for name in fresh if is_open or not group[name]["valid"]]
        for name in again:
            progress(f"{line(group[name])}; once more")
            group[name] = _measure(pair, tokens, name, rounds * (MORE if is_open else 1))
        if not again:
            break
    for name, row in group.items():
        progress(line(row) if name in fresh else f"{line(row)}, as kept")
    kept.add([group[name] for name in fresh])
    return [*group.values()]


def modes_for(pair: Pair, tokens: int) -> list[Mode]:
    """Return the modes worth measuring for so many tokens; layers without executions have one."""
    if any(layer.execution is None for layer in pair.fused_role.layers.values()):
        return ["fused"]
    slots = pair.layout.num_shared_slots
    return [mode.name for mode in MODES.values() if mode.runs(slots, tokens)]


def _measure(pair: Pair, tokens: int, name: str, rounds: int) -> dict[str, Any]:
    layout, layers = pair.layout, len(pair.stock)
    routers = [routings.Router.of(block, pair.decision.moe) for block in pair.stock]
    draw = torch.Generator(routers[0].gate.device).manual_seed(tokens)
    states = [routings.ROUTINGS[name].states(router, tokens, draw) for router in routers]
    # Those that the floor counts.
    experts = statistics.mean(router.distinct(own) for router, own in zip(routers, states, strict=True))

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
        "routing": name,
        "stock_us": statistics.median(stock) / layers * 1e6,
        "again": self_ratio.median,
        "valid": is_quiet(self_ratio),
        # Gates stay in 16 bit.
        "floor_us": floor_seconds(layout, 1, experts, gates * 2 // pair.itemsize, pair.itemsize) * 1e6,
        **tuned_tables(pair),
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
        f"M={row['tokens']} {row['routing']}: stock {row['stock_us']:.1f} us "
        f"(again {row['again']:.4f}{quiet}), {', '.join(parts)}, floor {row['floor_us']:.1f}"
    )


def errors(pair: Pair, seeds: int = SEEDS) -> dict[str, Any]:
    """Return RMS errors against float64 of stock and of every mode, over tokens whose choice is clear.

    Keys: tokens; stock, each mode and "control" (a mode with half the shared weight). Two entries for each
    seed: different tokens, and as many equal ones, for modes that read an expert once for several tokens.
    """
    off: dict[str, Any] = {"tokens": [], "stock": [], "control": []}
    stock, fused = pair.stock[0], pair.fused[0]
    layer = pair.fused_role.layers[min(pair.fused_role.layers)]
    for seed in range(seeds):
        *different, shares = reference(pair, seed)
        # The token that shows the control best.
        equal = [part[[int(shares.argmax())] * len(part)] for part in different]
        for states, expected in (different, equal):
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


def reference(pair: Pair, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return states [tokens, H] in bfloat16, the first stock block's output for them in float64, and for
    each token how large the shared expert's part of that is, against all of it.
    """
    layout, block = pair.layout, pair.stock[0]
    router = routings.Router.of(block, pair.decision.moe)
    draw = torch.Generator(router.gate.device).manual_seed(1000 + seed)
    drawn = routings.ROUTINGS[routings.EVEN].states(router, DRAWN, draw)
    scores = router.choice(router.logits(drawn))
    best = scores.topk(layout.top_k + 1, dim=1).values
    margin = (best[:, -2] - best[:, -1]) / scores.abs().amax(1)
    kept = margin.topk(ERROR_TOKENS).indices
    if float(margin[kept].min()) < CLEAR:
        raise FsePatchError("no tokens whose choice of experts is clear; another seed is needed")
    states = drawn[kept]
    weights, ids = router.route(router.logits(states))
    share: torch.Tensor | float = 1.0
    if (gate_name := pair.fused_role.start.naming.family.shared_gate) is not None:
        gate = getattr(block, gate_name)
        share = (states.double() @ gate.weight.data.double().T).sigmoid()
    weights, ids = append_shared_slots(weights, ids, layout.shared_slots, share)
    out, shared = torch.zeros_like(states, dtype=torch.float64), torch.zeros_like(states, dtype=torch.float64)
    for token in range(len(states)):
        for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
            one, up = (pair.exact(expert, "w13") @ states[token].double()).chunk(2)
            inner = torch.nn.functional.silu(one) * up
            part = weight * (pair.exact(expert, "w2") @ inner)
            out[token] += part
            if expert in layout.shared_slots:
                shared[token] += part
    return states, out, shared.norm(dim=1) / out.norm(dim=1)


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


def head(pair: Pair, name: str, rounds: int, commit: str) -> dict[str, Any]:
    """Return what all rows of a run have in common. The GEMM has run, for its tables to be known."""
    return {
        "shape": name,
        "device": pair.situation.device,
        "backend": pair.situation.backend,
        "quant": pair.situation.quant,
        "layers": len(pair.stock),
        "rounds": rounds,
        **tuned_tables(pair),
        "commit": commit,
        **versions(pair.situation.engine),
    }


def csv_columns(engine: str) -> list[str]:
    """Return the columns of a file of rows."""
    first = ("shape", "device", "backend", "quant", "layers", "rounds", *TABLES, "commit")
    return [*first, *versions(engine), *COLUMNS]
