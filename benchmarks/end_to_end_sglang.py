"""Decode steps of the real SGLang, one arm a process: random weights that spread over experts, CUDA graphs.

    FSE_PATCH=0 python benchmarks/end_to_end_sglang.py stock FOLDER --out stock.json
    FSE_PATCH=sglang python benchmarks/end_to_end_sglang.py fused FOLDER --out fused.json

FOLDER has a config.json alone (benchmarks/checkpoint.py writes one). The weights that route are drawn anew in
SGLang's scheduler.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import decode
import wrapt

from fse_patch.adapters.sglang import arm, worker

DEFAULTS: dict[str, Any] = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "dtype": "bfloat16",
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "disable_radix_cache": True,
    "max_running_requests": max(decode.STREAMS),
    "cuda_graph_bs_decode": list(decode.STREAMS),
    "cuda_graph_max_bs_decode": max(decode.STREAMS),
    "mem_fraction_static": 0.8,
    "log_level": "warning",
}


def bench_spread(self: Any) -> None:
    """Runs in the scheduler: see above. In place, so that captured graphs see it."""
    model = self.tp_worker.model_runner.model
    decode.spread(model)
    for name, parameter in model.named_parameters():
        if name.endswith("e_score_correction_bias"):
            parameter.data.zero_()
        elif name.endswith("norm.weight") and type(model).__name__.startswith("Glm"):
            parameter.data.fill_(1)  # norms of the other families are centred on zero
    for module in model.modules():
        if getattr(module, "_weight_fp32", None) is not None:
            module._weight_fp32.copy_(module.weight.data)


def extend(scheduler: Any) -> None:
    """Give the Scheduler class what is called."""
    scheduler.Scheduler.bench_spread = bench_spread


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("arm", choices=("stock", "fused"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engine-args", type=json.loads, default={}, help="JSON object")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    import sglang

    vocab = json.loads((args.folder / "config.json").read_text())["vocab_size"]
    start = time.perf_counter()
    engine = sglang.Engine(model_path=str(args.folder), **{**DEFAULTS, **args.engine_args})
    started = time.perf_counter() - start
    try:
        report = run(engine, args, vocab)
    finally:
        engine.shutdown()
    args.out.write_text(json.dumps({"start_seconds": started, **report}, indent=1))


def versions() -> dict[str, str]:
    """Of what a figure depends on."""
    import sglang
    import torch

    from fse_patch import __version__

    device = torch.cuda.get_device_name()
    names = {"fse_patch": __version__, "sglang": sglang.__version__, "torch": torch.__version__}
    return {"device": device, **names}


def run(engine: Any, args: argparse.Namespace, vocab: int) -> dict[str, Any]:
    """What one arm measures."""
    engine.collective_rpc("bench_spread")
    (process,) = arm.reports(engine)
    report = {"arm": args.arm, "versions": versions(), "engine_args": args.engine_args}
    report |= {"ran": process["roles"], "decisions": process["refused"]}
    if bool(report["ran"]) != (args.arm == "fused"):
        raise SystemExit(f"the {args.arm} arm is not {args.arm}: {process}")

    def generate(prompts: list[list[int]], length: int) -> list[int]:
        params = {"temperature": 0.0, "max_new_tokens": length, "ignore_eos": True}
        outputs = engine.generate(input_ids=prompts, sampling_params=params)
        return [out["output_ids"][-1] for out in outputs]

    report["steps"] = decode.steps(args.arm, generate, vocab, args.repeats)
    (after,) = arm.reports(engine)
    return {**report, "calls_by_mode": [role["calls_by_mode"] for role in after["roles"]]}


# SGLang spawns its schedulers, and a spawned process runs its parent's main module under this name.
if __name__ == "__mp_main__":
    worker.install()
    wrapt.register_post_import_hook(extend, worker.SCHEDULER)
if __name__ == "__main__":
    main()
