"""Small checkpoints through `verify` on a GPU, every mode of a fused layer in one run.

    python ci/gpu_verify.py ENGINE OUT [--fp8 FOLDER] [--only GROUP ...]

In an environment with a CUDA build of the engine, transformers and fse_patch. OUT gets the checkpoints, the
tables that choose the modes, and a report for each job. FOLDER is what `benchmarks/checkpoint.py --quant
fp8-block` wrote: vLLM runs it in each mode. The arms of a group run side by side. Exit status 1 if a job
fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fse_patch.adapters.patching import guards, ledger
from fse_patch.adapters.refusals import SHARED_GATE
from fse_patch.cli.verify import vocab_size
from fse_patch.fusion_core.checkpoint.sources import read_json
from fse_patch.fusion_core.decision.decide import decide_roles
from fse_patch.fusion_core.decision.outcome import Merged, Stock
from fse_patch.fusion_core.forward.tuned import Situation
from fse_patch.lab import decode_arm, tune, verify

# Prompts of 186 tokens run as 128 and 58, then 4 tokens a step: one run has all modes but `once`.
CHUNK = 128
# Prompts too run by a mode of few tokens: `once`.
FEW = 16
# Graphs of prompts: one for each mode, 58 tokens padded to the second.
PROMPT_GRAPHS = [FEW, 64, CHUNK]
ALL_MODES = {
    "steps": [{"up_to": 4, "mode": "small"}, {"up_to": FEW, "mode": "once"}, {"up_to": 80, "mode": "fused"}],
    "otherwise": "split",
}
ONCE_AND_FUSED = {"steps": [{"up_to": FEW, "mode": "once"}], "otherwise": "fused"}
SMALL_AND_SPLIT = {"steps": [{"up_to": 16, "mode": "small"}], "otherwise": "split"}
VLLM = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 30, "max_num_batched_tokens": CHUNK}
GDN = {"gdn_prefill_backend": "triton"}
GRAPHS = {"enforce_eager": False, "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, FEW]}}
ALL_GRAPHS = {**GRAPHS, "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, *PROMPT_GRAPHS]}}
SGLANG = {
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "max_total_tokens": 4096,
    "chunked_prefill_size": CHUNK,
}
SGLANG_GRAPHS = {
    "disable_cuda_graph": False,
    "disable_prefill_cuda_graph": True,
    "cuda_graph_bs_decode": [1, 2, 4],
    "cuda_graph_max_bs_decode": 4,
}
# As SGLang has it by default: prompts run in graphs too.
SGLANG_ALL_GRAPHS = {
    **SGLANG_GRAPHS,
    "disable_prefill_cuda_graph": False,
    "cuda_graph_bs_prefill": PROMPT_GRAPHS,
}
NATIVE = "triton, fused natively"
FP8 = "fp8"
FP8_ENV = {"VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER": "0", "FSE_PATCH_ALLOW_UNPROVEN": "1"}
LIMIT = 560.0


@dataclass(frozen=True)
class Group:
    """Jobs that one process of each arm runs one after the other.

    Args:
        jobs: name -> (recipe, or `FP8` for the folder that is given, engine arguments).
        backend: who runs the grouped GEMM, in the words of tuned tables.
        choice: the modes by number of tokens.
        dtype: the engine's; checkpoints are in bfloat16.
    """

    jobs: Mapping[str, tuple[str, Mapping[str, Any]]]
    backend: str = "triton"
    choice: Mapping[str, Any] = field(default_factory=lambda: ALL_MODES)
    quant: str = "none"
    dtype: str = "bfloat16"
    env: Mapping[str, str] = field(default_factory=dict)


def fp8(choice: Mapping[str, Any]) -> Group:
    """Verify the FP8 checkpoint in vLLM."""
    arguments = {**VLLM, **GDN, "kv_cache_memory_bytes": 2 << 30}
    jobs = {"qwen3_next": (FP8, arguments)}
    return Group(jobs, "triton+deepgemm", choice, "fp8-block 128x128", env=FP8_ENV)


GROUPS: dict[str, dict[str, Group]] = {
    "vllm": {
        "small": Group(
            {
                "qwen3_next": ("qwen3_next", {**VLLM, **GDN}),
                # The text-only class is not in this release's registry.
                "qwen3_5": ("qwen3_5_vl", {**VLLM, **GDN, "language_model_only": True}),
                "glm4": ("glm4_moe_scale", VLLM),
                "qwen2_moe": ("qwen2_moe", VLLM),
            }
        ),
        "few": Group(
            {
                "qwen3_next": ("qwen3_next", {**VLLM, **GDN, "max_num_batched_tokens": FEW}),
                "glm4_graphs": ("glm4_moe_scale", {**VLLM, **GRAPHS, "max_num_batched_tokens": FEW}),
                "glm4_graphs_of_steps": ("glm4_moe_scale", {**VLLM, **GRAPHS}),
            }
        ),
        "graphs": Group(
            {
                "qwen3_next": ("qwen3_next", {**VLLM, **GDN, **ALL_GRAPHS}),
                "glm4": ("glm4_moe_scale", {**VLLM, **ALL_GRAPHS}),
            }
        ),
        "float16": Group(
            {
                "qwen3_next": ("qwen3_next", {**VLLM, **GDN}),
                # With another routed_scaling_factor than 1 stock itself is wrong (docs/hazards.md).
                "glm4": ("glm4_moe", VLLM),
                "qwen2_moe": ("qwen2_moe", VLLM),
            },
            dtype="float16",
        ),
        "fp8": fp8(SMALL_AND_SPLIT),
        "fp8_fused": fp8(ONCE_AND_FUSED),
    },
    "sglang": {
        "ours": Group(
            {
                "qwen3_5": ("qwen3_5_text", SGLANG),
                "qwen3_5_graphs": ("qwen3_5_text", {**SGLANG, **SGLANG_GRAPHS}),
                "qwen3_5_all_graphs": ("qwen3_5_text", {**SGLANG, **SGLANG_ALL_GRAPHS}),
                "qwen3_5_few": ("qwen3_5_text", {**SGLANG, "chunked_prefill_size": FEW}),
            }
        ),
        "native": Group(
            {
                "qwen3_next": ("qwen3_next", SGLANG),
                "qwen3_next_graphs": ("qwen3_next", {**SGLANG, **SGLANG_GRAPHS}),
                "qwen3_next_all_graphs": ("qwen3_next", {**SGLANG, **SGLANG_ALL_GRAPHS}),
                "qwen3_next_few": ("qwen3_next", {**SGLANG, "chunked_prefill_size": FEW}),
                "glm4": ("glm4_moe_scale", SGLANG),
            },
            NATIVE,
        ),
        # By default SGLang keeps this state in bfloat16, and its kernel does not compile for the two.
        "float16": Group(
            {"qwen3_5": ("qwen3_5_text", SGLANG)},
            dtype="float16",
            env={"SGLANG_MAMBA_CONV_DTYPE": "float16"},
        ),
        "float16_native": Group({"glm4": ("glm4_moe_scale", SGLANG)}, NATIVE, dtype="float16"),
    },
}


def table(
    engine: str, release: str, device: str, group: Group, decisions: Sequence[Merged]
) -> dict[str, Any]:
    """Write a tuned table that has the group's modes for the layers of ``decisions``."""
    rows = {}
    for decision in decisions:
        moe = decision.moe
        situation = Situation.of(
            moe.layout,
            1,
            engine=engine,
            release=release,
            backend=group.backend,
            device=device,
            dtype=group.dtype,
            scoring=moe.routing.scoring,
            gated=moe.shared_weight == SHARED_GATE,
            quant=group.quant,
        )
        held = asdict(situation)
        head = {name: held.pop(name) for name in tune.HEAD}
        rows[situation] = {**held, **group.choice}
    return {**head, "versions": {}, "measured": "by hand, to verify every mode", "rows": list(rows.values())}


def run(engine: str, name: str, group: Group, folders: Mapping[str, Path], out: Path) -> list[dict[str, Any]]:
    """Return the reports of a group's jobs, in their order."""
    jobs = []
    for recipe, arguments in group.jobs.values():
        folder = folders[recipe]
        vocab = vocab_size(read_json(folder / "config.json"), folder)
        decision = decide_roles(folder, engine)["main"]
        if isinstance(decision, Stock):
            sys.exit(f"{folder} does not fuse: {decision.reason.code}: {decision.reason.detail}")
        jobs.append(verify.VerifyJob(folder, (decision,), vocab, group.dtype, arguments))
    release = guards.engine_version(ledger.load(engine)).partition("+")[0]
    decisions = [job.decisions[0] for job in jobs]
    held = table(engine, release, decode_arm.device(), group, decisions)
    tuned = out / f"{engine}_{name}.yaml"
    tuned.write_text(yaml.safe_dump(held))
    env = {**os.environ, **group.env, "FSE_PATCH_TUNED": str(tuned)}
    with ThreadPoolExecutor(2) as pool:
        arms = pool.map(
            lambda fused: verify.run_arm(
                engine, jobs, fused, {**env, "VLLM_CACHE_ROOT": str(out / f"cache_{fused}")}, LIMIT
            ),
            (False, True),
        )
    return [
        {"engine": engine, "engine_version": release, **verify.judge(job, stock, fused)}
        for job, stock, fused in zip(jobs, *arms, strict=True)
    ]


def line(report: Mapping[str, Any]) -> str:
    """Return a report in words."""
    if "mean_abs_logprob_diff" not in report:
        return f"FAILED {'; '.join(report['failures'])}\n{report.get('log', '')[-2000:]}"
    noises = ", ".join(f"{name} {mean:.4f}" for name, mean in report["stock_noises"].items())
    canary = ", ".join(str(role.get("canary", {}).get("state")) for role in report["roles"])
    return (
        f"{'passed' if report['passed'] else 'FAILED'}: {report['mean_abs_logprob_diff']:.4f} off, "
        f"{report['mean_abs_answer_diff']:.4f} in {report['answer_tokens']} steps of answers; noises "
        f"{noises}, control {report['control_diff']:.3f}; {report['calls_by_mode']}, captured "
        f"{report['captured_by_mode']}; "
        f"canary {canary}; {'; '.join(report['failures'])}"
    )


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("engine", choices=GROUPS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--fp8", type=Path, help="an FP8 checkpoint; its groups are left out without it")
    parser.add_argument("--only", nargs="*", default=[], help="these groups alone")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    groups = {
        name: group for name, group in GROUPS[args.engine].items() if args.fp8 or not name.startswith(FP8)
    }
    if unknown := set(args.only) - groups.keys():
        parser.error(f"--only {sorted(unknown)[0]}: not among {', '.join(groups)}; FP8 needs --fp8")
    groups = {name: groups[name] for name in args.only or groups}
    from checkpoints import gpu
    from checkpoints.make import make

    gpu.enlarge()
    recipes = {recipe for group in groups.values() for recipe, _ in group.jobs.values()} - {FP8}
    folders = {recipe: make(recipe, args.out / recipe, "bfloat16") for recipe in sorted(recipes)}
    if args.fp8:
        folders[FP8] = args.fp8
    failed = False
    for name, group in groups.items():
        for job, report in zip(group.jobs, run(args.engine, name, group, folders, args.out), strict=True):
            print(f"{args.engine} {name} {job}: {line(report)}", flush=True)
            report.pop("log", None)
            report["checkpoint"] = Path(report["checkpoint"]).name
            (args.out / f"{args.engine}_{name}_{job}.json").write_text(json.dumps(report, indent=2) + "\n")
            failed |= not report["passed"]
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
