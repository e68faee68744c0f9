"""Decode steps of an engine: the slope between a short and a long answer, so that prefill does not count."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

SHORT, LONG, PROMPT = 33, 161, 64
STREAMS = (1, 2, 4, 8, 16, 64)
# Dummy weights alone send every token to the same experts: what routes, comes in and goes out is drawn anew.
DRAWN = ("gate.weight", "embed_tokens.weight", "lm_head.weight")
STD = 0.05
# (prompts, new tokens) -> the last token of each answer.
Generate = Callable[[list[list[int]], int], Sequence[int]]


def spread(model: Any) -> None:
    """Draw those weights, in place and by their names, so that both arms have the same."""
    import torch

    for name, parameter in model.named_parameters():
        if name.endswith(DRAWN):
            draw = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
            parameter.data.normal_(0, STD, generator=draw)


def steps(arm: str, generate: Generate, vocab: int, repeats: int) -> dict[int, dict[str, Any]]:
    """For each number of streams: ``ms`` a step, every time taken, and how many streams ended differently.

    Streams that have come to the same tokens choose the same experts.
    """
    found: dict[int, dict[str, Any]] = {}
    for streams in STREAMS:
        prompts = [[(i * 131 + j * 17) % (vocab - 10) + 10 for j in range(PROMPT)] for i in range(streams)]
        seconds: dict[int, list[float]] = {SHORT: [], LONG: []}
        last: set[int] = set()
        for number in range(repeats + 1):
            for length in (SHORT, LONG):
                start = time.perf_counter()
                tokens = generate(prompts, length)
                if number:  # the first one warms up
                    seconds[length].append(time.perf_counter() - start)
                last = set(tokens)
        ms = (min(seconds[LONG]) - min(seconds[SHORT])) / (LONG - SHORT) * 1e3
        found[streams] = {"ms": ms, "seconds": seconds, "different_tokens": len(last)}
        print(f"{arm}, {streams} streams: {ms:.3f} ms a step, {len(last)} tokens", flush=True)
    return found
