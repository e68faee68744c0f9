"""Decode steps of the real vLLM, one arm a process: random weights, a router that spreads them, CUDA graphs.

    FSE_PATCH=0 python benchmarks/end_to_end.py stock FOLDER --out stock.json
    FSE_PATCH=vllm python benchmarks/end_to_end.py fused FOLDER --out fused.json

FOLDER has a config.json alone (benchmarks/checkpoint.py --config-only writes one). Milliseconds a step are
the slope between a short and a long answer, so that prefill does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

SHORT, LONG, PROMPT = 33, 161, 64
STREAMS = (1, 2, 4, 8, 16, 64)
ROUTER_STD = 0.05


def spread(model: Any) -> int:
    """Random router and embeddings: dummy weights alone send every token to the same experts."""
    import torch

    draw = torch.Generator(device="cuda").manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight") or "embed_tokens" in name:
            parameter.data.normal_(0, ROUTER_STD, generator=draw)
    return 0


def ran(model: Any) -> Any:
    """What the model says of itself: None where it is stock."""
    fusion = getattr(model, "_fse_patch", None)
    return None if fusion is None else fusion.report()


def versions() -> dict[str, str]:
    """Of what a figure depends on."""
    import torch
    import vllm

    from fse_patch import __version__

    device = torch.cuda.get_device_name()
    return {"device": device, "fse_patch": __version__, "vllm": vllm.__version__, "torch": torch.__version__}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("arm", choices=("stock", "fused"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engine-args", type=json.loads, default={}, help="JSON object")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    start = time.perf_counter()
    llm = LLM(
        model=str(args.folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=64,
        enable_prefix_caching=False,
        compilation_config={"cudagraph_capture_sizes": list(STREAMS)},
        **args.engine_args,
    )
    started = time.perf_counter() - start
    llm.apply_model(spread)
    report = {
        "arm": args.arm,
        "versions": versions(),
        "start_seconds": started,
        "ran": llm.apply_model(ran)[0],
        "steps": {},
    }
    if (report["ran"] is None) != (args.arm == "stock"):
        raise SystemExit(f"the {args.arm} arm is not {args.arm}")
    for streams in STREAMS:
        prompts = [
            {"prompt_token_ids": [(i * 131 + j * 17) % 31000 + 10 for j in range(PROMPT)]}
            for i in range(streams)
        ]
        seconds: dict[int, list[float]] = {SHORT: [], LONG: []}
        for _ in range(args.repeats):
            for length in (SHORT, LONG):
                params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
                start = time.perf_counter()
                llm.generate(prompts, params, use_tqdm=False)
                seconds[length].append(time.perf_counter() - start)
        step = (min(seconds[LONG]) - min(seconds[SHORT])) / (LONG - SHORT) * 1e3
        report["steps"][streams] = {"ms": step, "seconds": seconds}
        print(f"{args.arm}, {streams} streams: {step:.3f} ms a step", flush=True)
    args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
