"""Decode steps of the real vLLM, one arm a process: random weights, a router that spreads them, CUDA graphs.

    FSE_PATCH=0 python benchmarks/end_to_end.py stock FOLDER --out stock.json
    FSE_PATCH=vllm python benchmarks/end_to_end.py fused FOLDER --out fused.json

FOLDER has a config.json alone (benchmarks/checkpoint.py --config-only writes one).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import decode


def spread(model: Any) -> int:
    """What a worker of vLLM runs; see `decode.spread`."""
    decode.spread(model)
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
        max_num_seqs=max(decode.STREAMS),
        enable_prefix_caching=False,
        compilation_config={"cudagraph_capture_sizes": list(decode.STREAMS)},
        **args.engine_args,
    )
    started = time.perf_counter() - start
    llm.apply_model(spread)
    report = {
        "arm": args.arm,
        "versions": versions(),
        "start_seconds": started,
        "ran": llm.apply_model(ran)[0],
    }
    if (report["ran"] is None) != (args.arm == "stock"):
        raise SystemExit(f"the {args.arm} arm is not {args.arm}")

    def generate(prompts: list[list[int]], length: int) -> list[int]:
        params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [out.outputs[0].token_ids[-1] for out in outputs]

    vocab = json.loads((args.folder / "config.json").read_text())["vocab_size"]
    report["steps"] = decode.steps(args.arm, generate, vocab, args.repeats)
    args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
