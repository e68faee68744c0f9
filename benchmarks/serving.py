"""Tokens a second of a whole model in vLLM, prompts and answers: one arm in one process.

    python benchmarks/serving.py stock benchmarks/shapes/qwen3_next_80b --layers 48 --quant fp8-block --csv F
    python benchmarks/serving.py fused ...                       then stock once more: runs differ
    python benchmarks/serving.py stock ... --profile F          also kernels of 8192 tokens by time

For models of which two do not fit one device. Weights are random (`fse-patch bench --end-to-end` draws the
same), prompts are token ids, answers greedy; those to one prompt are drawn at temperature 1. A row of the
file is one call: all prompts at once, their answers awaited. A `first` call stops after one token: that is
the time of the prompts.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from checkpoint import is_quantised, sparse_shapes

COLUMNS = (
    *("model", "device", "quant", "layers", "arm", "kind", "prompt_tokens", "answer_tokens", "streams"),
    *("prompts", "seconds", "tokens_per_second", "commit", "vllm", "torch", "triton"),
)
VOCAB = 151936
# Layers that published FP8 checkpoints of the Qwen families leave plain.
PLAIN = ("mlp.gate", "mlp.shared_expert_gate", "linear_attn.conv1d", "linear_attn.in_proj_ba")
BLOCK: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER": "0",
    "HF_HUB_OFFLINE": "1",
}
STREAMS = "1,2,4,8,16,32,64"
# Answers to one prompt.
ALIKE = 16
# Tokens of one step at most.
BATCH = 8192


def folder_of(shape: Path, layers: int, quant: str, place: Path) -> Path:
    """Write a config.json with so many layers, as published."""
    config = json.loads((shape / "config.json").read_text())
    config |= {"num_hidden_layers": layers, "vocab_size": VOCAB}
    config.pop("layer_types", None)
    if quant:
        plain = [f"model.layers.{layer}.{name}" for layer in range(layers) for name in PLAIN]
        config["quantization_config"] = {**BLOCK, "modules_to_not_convert": ["lm_head", *plain]}
        write_headers(config, quant, place / "model.safetensors")
    (place / "config.json").write_text(json.dumps(config))
    return place


def write_headers(config: dict[str, Any], quant: str, file: Path) -> None:
    """Write a file of the sparse layers that has headers and no data: by them is decided what fuses."""
    header: dict[str, Any] = {}
    end = 0
    layers = (sparse_shapes(config, layer) for layer in range(config["num_hidden_layers"]))
    for name, shape in chain.from_iterable(layers):
        stored = {name: ("BF16", 2, shape)}
        if is_quantised(name, quant):
            scales = tuple(
                -(-size // side) for size, side in zip(shape, BLOCK["weight_block_size"], strict=True)
            )
            stored = {name: ("F8_E4M3", 1, shape), f"{name}_scale_inv": ("BF16", 2, scales)}
        for tensor, (dtype, size, sizes) in stored.items():
            begin, end = end, end + size * math.prod(sizes)
            header[tensor] = {"dtype": dtype, "shape": sizes, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        # A hole of the file system takes no room.
        out.truncate(8 + len(text) + end)


def draw_blocks() -> None:
    """Draw the experts of dummy weights as they are loaded: in FP8 vLLM's own are nearly all 0.

    What is proved at the start has to be seen above rounding.
    """
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    from fse_patch.lab.random_weights import fill

    stock = DummyModelLoader.load_weights

    def load_weights(self: Any, model: Any, model_config: Any) -> None:
        stock(self, model, model_config)
        blocks = [
            module for module in model.modules() if hasattr(module, "experts") and hasattr(module, "gate")
        ]
        for seed, block in enumerate(blocks):
            fill(block, seed)

    DummyModelLoader.load_weights = load_weights


def open_engine(folder: Path, streams: list[int], tokens: int) -> Any:
    """Start vLLM on dummy weights, and draw what routes."""
    from vllm import LLM

    from fse_patch.lab.random_weights import spread

    draw_blocks()
    engine = LLM(
        model=str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=4 * tokens,
        max_num_seqs=max(*streams, ALIKE),
        max_num_batched_tokens=BATCH,
        gpu_memory_utilization=0.9,
        enable_prefix_caching=False,
        gdn_prefill_backend="triton",
        compilation_config={"cudagraph_capture_sizes": sorted({*streams, ALIKE})},
    )
    engine.apply_model(spread)
    return engine


def check_on() -> None:
    """Say what is on; exit where nothing is: rows of such an arm would be stock's."""
    import fse_patch

    roles = fse_patch.status()["vllm"]["roles"]
    print(roles, flush=True)
    # Paired layers whose threshold is 0 are run by the engine.
    if not roles or any("paired" in role and not role["paired"]["threshold"] for role in roles):
        sys.exit("not on: the log has the reason")


def calls(
    engine: Any, streams: list[int], rounds: int, prompt: int, answer: int
) -> Iterator[tuple[str, int, int, int, float]]:
    """Yield kind, streams, prompts, tokens of an answer and seconds of each call, warm ones apart."""
    for count, each in [*((n, 1) for n in streams), (1, ALIKE)]:
        ask(engine, count, each, prompt, 8, 1)
        for number in range(rounds):
            first = ask(engine, count, each, prompt, 1, 2 + 2 * number)
            yield "first", count * each, count, 1, first
            whole = ask(engine, count, each, prompt, answer, 3 + 2 * number)
            yield "whole", count * each, count, answer, whole


def ask(engine: Any, count: int, each: int, prompt: int, tokens: int, seed: int) -> float:
    """Send ``count`` prompts at once, ``each`` answers to one; returns seconds until the last answer."""
    from vllm import SamplingParams

    ids = [
        {"prompt_token_ids": [(i * 7919 + j * 104729 + seed * 31) % 150000 + 100 for j in range(prompt)]}
        for i in range(count)
    ]
    how = SamplingParams(
        n=each,
        temperature=1.0 if each > 1 else 0.0,
        seed=seed if each > 1 else None,
        max_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
    )
    start = time.perf_counter()
    engine.generate(ids, how, use_tqdm=False)
    return time.perf_counter() - start


def profile(engine: Any, prompt: int, file: Path) -> None:
    """Write the kernels of prompts of `BATCH` tokens in one step, those that take longest first."""
    import torch
    from torch.profiler import ProfilerActivity

    ask(engine, BATCH // prompt, 1, prompt, 1, 101)
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        ask(engine, BATCH // prompt, 1, prompt, 1, 102)
    kernels = [event for event in seen.key_averages() if event.self_device_time_total]
    with file.open("w", newline="") as out:
        rows = csv.writer(out)
        rows.writerow(("milliseconds", "calls", "kernel"))
        for event in sorted(kernels, key=lambda event: -event.self_device_time_total):
            rows.writerow((f"{event.self_device_time_total / 1e3:.3f}", event.count, event.key))


def main() -> None:
    """Run one arm."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("arm", choices=("stock", "fused", "merged", "paired"))
    parser.add_argument("shape", type=Path, help="folder with a config.json")
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--quant", choices=("", "fp8-block"), default="")
    parser.add_argument("--streams", default=STREAMS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--answer", type=int, default=257)
    parser.add_argument("--csv", type=Path, required=True, help="rows are appended as they are measured")
    parser.add_argument("--profile", type=Path, help="a CSV of kernels by time")
    parser.add_argument("--commit", default="")
    given = parser.parse_args()
    os.environ |= {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    if given.arm != "stock":
        os.environ["FSE_PATCH_ALLOW_UNPROVEN"] = "1"
        if given.arm != "fused":
            os.environ["FSE_PATCH_LAYOUT"] = given.arm
        import fse_patch

        fse_patch.apply("vllm")
    streams = [int(number) for number in given.streams.split(",")]
    with tempfile.TemporaryDirectory() as place:
        folder = folder_of(given.shape, given.layers, given.quant, Path(place))
        engine = open_engine(folder, streams, given.prompt + given.answer)
        if given.arm != "stock":
            check_on()
        import torch
        import triton
        import vllm

        head = [given.shape.resolve().name, torch.cuda.get_device_name(), given.quant or "none", given.layers]
        tail = [given.commit, vllm.__version__, torch.__version__, triton.__version__]
        new = not given.csv.exists()
        with given.csv.open("a", newline="") as file:
            rows = csv.writer(file)
            if new:
                rows.writerow(COLUMNS)
            for kind, count, prompts, tokens, seconds in calls(
                engine, streams, given.rounds, given.prompt, given.answer
            ):
                speed = f"{count * tokens / seconds:.1f}"
                row = [given.prompt, tokens, count, prompts, f"{seconds:.4f}", speed]
                rows.writerow([*head, given.arm, kind, *row, *tail])
                file.flush()
                print(given.arm, kind, *row, flush=True)
        if given.profile:
            profile(engine, given.prompt, given.profile)


if __name__ == "__main__":
    main()
