"""Each thing that a launch asks for has the reason that the engine gives."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from .plans import BEST, COMMANDS, checkpoint, plan
from .test_cli_plan import sound

# Flags beside an H200 that fuses, and the code that each of them leads to.
FLAGS = [
    ("vllm", "", None),
    # In one process nothing is spread.
    ("vllm", "--enable-expert-parallel", None),
    ("vllm", "-tp 2 --enable-expert-parallel", None),
    ("vllm", "-tp 2 --enable-expert-parallel --moe-backend flashinfer_cutlass", "backend.layout"),
    ("vllm", "--enable-eplb", "parallel.eplb"),
    ("vllm", "-dp 2", "parallel.dp"),
    ("vllm", "--prefill-context-parallel-size 2", "parallel.dp"),
    ("vllm", "--enable-lora", "lora"),
    ("vllm", "--enable-lora --lora-target-modules q_proj o_proj", None),
    ("vllm", "--enable-lora --lora-target-modules q_proj down_proj", "lora"),
    ("vllm", "-dp 2 --enable-expert-parallel", "parallel.all2all"),
    ("vllm", "--cpu-offload-gb 4", "memory.offload"),
    ("vllm", "--cpu-offload-gb 4 --enable-lora", "lora"),
    ("vllm", "-dp 2 --enable-lora", "parallel.dp"),
    ("vllm", "--enable-sleep-mode", "memory.sleep"),
    ("vllm", "-tp 3", "parallel.tp"),
    ("vllm", "--enable-return-routed-experts", "routing.capture"),
    ("vllm", '--weight-transfer-config \'{"backend": "other"}\'', None),
    ("vllm", "--quantization fp8", None),
    ("vllm", "--moe-backend flashinfer_cutlass", "backend.layout"),
    ("vllm", "--dtype float32", None),
    ("vllm", "--hf-overrides '{\"num_experts_per_tok\": 4}'", "config.differs"),
    ("vllm", "--hf-overrides '{\"max_position_embeddings\": 4096}'", None),
    ("vllm", "--load-format runai_streamer_sharded", None),
    ("sglang", "", None),
    ("sglang", "--disable-shared-experts-fusion", "disabled"),
    ("sglang", "--tp 2 --ep-size 2", None),
    ("sglang", "--tp 2 --ep-size 2 --moe-runner-backend triton", None),
    ("sglang", "--tp 6 --ep-size 3", "parallel.ep"),
    ("sglang", "--tp 6 --ep-size 2", "parallel.tp"),
    ("sglang", "--enable-lora --lora-target-modules q_proj", None),
    ("sglang", "--lora-paths a=/nowhere", "lora"),
    ("sglang", "--enable-waterfill", "parallel.all2all"),
    ("sglang", "--elastic-ep-join-mode x", "backend.layout"),
    ("sglang", "--moe-a2a-backend deepep", "parallel.all2all"),
    ("sglang", "--dp-size 2", "parallel.dp"),
    ("sglang", "--pp-size 2", None),
    ("sglang", "--moe-runner-backend flashinfer_cutlass", "backend.topk_format"),
    ("sglang", "--enable-deterministic-inference", "slower.unmeasured"),
    ("sglang", "--expert-distribution-recorder-mode stat", "routing.capture"),
]
# Beside FSE_PATCH_LAYOUT=merged, where these lead to another code: without it such a launch is paired.
MERGED_FLAGS = [
    ("vllm", "-tp 2 --enable-expert-parallel", "slower.unmeasured"),
    ("vllm", '--weight-transfer-config \'{"backend": "other"}\'', "load.format"),
    ("vllm", "--quantization fp8", "quant.online"),
    ("vllm", "--dtype float32", "slower.unmeasured"),
    ("vllm", "--load-format runai_streamer_sharded", "load.format"),
    ("sglang", "--tp 2 --ep-size 2", "slower.unmeasured"),
    ("sglang", "--tp 2 --ep-size 2 --moe-runner-backend triton", "slower.unmeasured"),
]


@pytest.mark.parametrize(
    ("layout", "engine", "flags_given", "reason"),
    [*(("auto", *row) for row in FLAGS), *(("merged", *row) for row in MERGED_FLAGS)],
)
def test_each_flag_has_its_reason(
    layout: str, engine: str, flags_given: str, reason: str | None, tmp_path: Path
) -> None:
    folder = checkpoint("qwen3.5_35b_text", tmp_path)
    words = shlex.split(f"FSE_PATCH_LAYOUT={layout} {COMMANDS[engine]} {flags_given}")
    _, report = plan(folder, "--engine-version", BEST[engine], "--device", "NVIDIA H200", "--", *words)
    assert report["runtime"]["reason"] == reason, report["runtime"]["detail"]
    # What the checkpoint is does not depend on the launch, but for the files that are loaded.
    assert report["fuse"] is ("--load-format" not in flags_given)


SPREAD = "-tp 2 --enable-expert-parallel"
# Beside FSE_PATCH_LAYOUT=paired, and the code that each leads to.
PAIRED_FLAGS = [
    ("vllm", "", "-tp 2 --enable-expert-parallel", None),
    ("vllm", "VLLM_BATCH_INVARIANT=1", "", "slower.unmeasured"),
    ("vllm", "", "--enable-lora", "lora"),
    ("vllm", "", "--moe-backend flashinfer_cutlass", "backend.layout"),
    ("vllm", "", "--moe-backend FlashInfer-CUTLASS", "backend.layout"),
    ("vllm", "", "--moe-backend batched_triton", "backend.layout"),
    ("vllm", "", '--kernel-config \'{"moe_backend": "flashinfer_cutlass"}\'', "backend.layout"),
    ("vllm", "", "--kernel-config.moe_backend flashinfer_cutlass", "backend.layout"),
    ("vllm", "", "--kernel-config.moe_backend auto", None),
    ("vllm", "", "--moe-backend triton", None),
    # Weights that stay where the engine keeps them are updated as it does.
    ("vllm", "", '--weight-transfer-config \'{"backend": "other"}\'', None),
    ("sglang", "", "--tp 2 --ep-size 2", None),
    ("sglang", "", "--moe-runner-backend flashinfer_cutlass", "backend.layout"),
    ("sglang", "", "--enable-two-batch-overlap", "backend.layout"),
    ("sglang", "", "--enable-deterministic-inference", "slower.unmeasured"),
    ("sglang", "", "--disable-shared-experts-fusion", "disabled"),
    ("sglang", "SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED=1", "", "backend.layout"),
]


@pytest.mark.parametrize(("engine", "variables", "flags_given", "reason"), PAIRED_FLAGS)
def test_flags_beside_the_paired_layout(
    engine: str, variables: str, flags_given: str, reason: str | None, tmp_path: Path
) -> None:
    folder = checkpoint("qwen3.5_35b_text", tmp_path)
    words = shlex.split(f"FSE_PATCH_LAYOUT=paired {variables} {COMMANDS[engine]} {flags_given}")
    _, report = plan(folder, "--engine-version", BEST[engine], "--device", "NVIDIA H200", "--", *words)
    runtime = report["runtime"]
    assert (runtime["reason"], runtime["layout"]) == (reason, None if reason else "paired"), runtime["detail"]


@pytest.mark.parametrize(
    ("engine", "flag"), [("vllm", "--enforce-eager"), ("sglang", "--disable-cuda-graph")]
)
def test_without_graphs_nothing_pairs_by_itself(engine: str, flag: str, tmp_path: Path) -> None:
    folder = checkpoint("qwen3.6-35b-fp8-block", tmp_path)
    for layout, flags_given, told in (
        ("auto", "", "paired"),
        ("auto", flag, None),
        ("paired", flag, "paired"),
    ):
        words = shlex.split(f"FSE_PATCH_LAYOUT={layout} {COMMANDS[engine]} {flags_given}")
        _, report = plan(folder, "--engine-version", BEST[engine], "--device", "NVIDIA H200", "--", *words)
        assert report["runtime"]["layout"] == told, report["runtime"]["detail"]


@pytest.mark.parametrize(
    ("name", "device", "flags_given", "reason"),
    [
        ("qwen3.6-35b-fp8-block", "NVIDIA H200", "--moe-backend deep_gemm", None),
        ("qwen3.6-35b-fp8-block", "NVIDIA H200", "--moe-backend cutlass", None),
        ("qwen3.6-35b-fp8-block", "NVIDIA H200", "--moe-backend marlin", "backend.layout"),
        ("qwen3.6-35b-fp8-block", "NVIDIA H200", "--moe-backend humming", "backend.layout"),
        ("qwen3.6-35b-fp8-block", "NVIDIA H200", "--moe-backend hpc", "backend.layout"),
        # Packed experts lie in Marlin's order, which is read, on whatever device.
        ("qwen3.6-35b-gptq-routed-only", "NVIDIA H200", "--moe-backend marlin", None),
        ("qwen3.6-35b-gptq-routed-only", "NVIDIA B200", "", None),
        ("qwen3.5-35b-bf16-stacked", "NVIDIA B200", "", "backend.layout"),
        ("qwen3.5-35b-bf16-stacked", "NVIDIA RTX PRO 4500 Blackwell", "", "backend.layout"),
        ("qwen3.5-35b-bf16-stacked", "NVIDIA RTX 5000 Ada Generation", "", None),
        # Devices that convert FP8, and those that do not.
        ("qwen3.6-35b-fp8-block", "NVIDIA L40S", "", None),
        ("qwen3.6-35b-fp8-block", "NVIDIA A100-SXM4-80GB", "", "backend.layout"),
        ("qwen3.6-35b-fp8-block", "NVIDIA GeForce RTX 3090", "", "backend.layout"),
        ("qwen3.5-35b-bf16-stacked", "NVIDIA A100-SXM4-80GB", "", None),
        # Who runs quantised experts that are spread is known where the user says it, in either flag.
        ("qwen3.6-35b-fp8-block", "NVIDIA H200", SPREAD, "backend.layout"),
        ("qwen3.6-35b-fp8-block", "NVIDIA H200", f"{SPREAD} --moe-backend triton", None),
        ("qwen3.6-35b-fp8-block", "NVIDIA H200", f"{SPREAD} --kernel-config.moe_backend triton", None),
        ("qwen3.6-35b-fp8-block", "NVIDIA H200", f"{SPREAD} --moe-backend auto", "backend.layout"),
    ],
)
def test_who_runs_experts_decides_whether_they_are_read(
    name: str, device: str, flags_given: str, reason: str | None, tmp_path: Path
) -> None:
    words = shlex.split(f"FSE_PATCH_LAYOUT=paired {COMMANDS['vllm']} {flags_given}")
    given = ["--engine-version", BEST["vllm"], "--device", device, "--", *words]
    runtime = plan(checkpoint(name, tmp_path), *given)[1]["runtime"]
    assert (runtime["reason"], runtime["layout"]) == (reason, None if reason else "paired"), runtime["detail"]


# Rows of golden/, and what the paired kernels do not read of them.
UNREAD = [
    ("qwen3.6-35b-gptq-routed-only", ""),
    ("qwen3.6-35b-fp8-block", ""),
    ("qwen3.5-35b-bf16-stacked", ""),
    ("qwen3-next-config-only", ""),
    ("qwen3-next-w4a16", "shared packed weight_packed/weight_scale/weight_shape"),
    ("qwen3.6-35b-nvfp4", "shared packed input_global_scale/weight_global_scale/weight_packed/weight_scale"),
    ("qwen3.5-122b-nvfp4-shared-in-bf16", "routed nvfp4"),
    ("qwen3.5-35b-gptq-8bit-routed-only", "routed int8-gptq"),
    ("qwen3.5-35b-int8", "shared I8"),
    ("qwen3-next-bitsandbytes-shared-skipped", "routed bitsandbytes-4bit"),
]


@pytest.mark.parametrize(("name", "unread"), UNREAD)
def test_formats_that_the_paired_kernels_do_not_read(name: str, unread: str, tmp_path: Path) -> None:
    folder = checkpoint(name, tmp_path)
    given = ["--engine-version", "0.26.0", "--device", "NVIDIA H200"]
    runtime = plan(folder, *given, "--", "FSE_PATCH_LAYOUT=paired", "vllm", "serve", "M")[1]["runtime"]
    assert runtime["reason"] == ("backend.layout" if unread else None)
    assert runtime["detail"].endswith(unread)


@pytest.mark.parametrize(("engine", "release"), [("vllm", "0.33.0"), ("sglang", "0.5.23")])
def test_experts_that_constants_stand_in_for(engine: str, release: str, tmp_path: Path) -> None:
    folder = sound(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    given = ["--engine-version", release, "--device", "cpu", "--", *COMMANDS[engine].split()]
    assert plan(folder, *given)[1]["runtime"]["reason"] is None
    (folder / "config.json").write_text(json.dumps({**config, "approximate_experts": {"0": [1]}}))
    assert plan(folder, *given)[1]["runtime"]["reason"] == "backend.routing"


def test_experts_spread_whole_run_where_that_is_allowed(tmp_path: Path) -> None:
    folder = checkpoint("qwen3.5_35b_text", tmp_path)
    words = shlex.split("FSE_PATCH_ALLOW_UNMEASURED=1 vllm serve M -tp 2 --enable-expert-parallel")
    for device, reason in (("NVIDIA H200", None), ("cpu", "parallel.ep"), ("MI300X", "parallel.ep")):
        given = ["--engine-version", "0.26.0", "--device", device, "--", *words]
        assert plan(folder, *given)[1]["runtime"]["reason"] == reason, device


SPREAD = {"vllm": "-tp 2 --enable-expert-parallel", "sglang": "--tp-size 2 --ep-size 2"}


@pytest.mark.parametrize("engine", SPREAD)
def test_expert_parallelism_is_run_where_the_user_takes_it_unmeasured(engine: str, tmp_path: Path) -> None:
    folder = checkpoint("qwen3.5_35b_text", tmp_path)
    for device, served in (("NVIDIA H200", "fused"), ("cpu", "stock")):
        words = shlex.split(f"FSE_PATCH_ALLOW_UNMEASURED=1 {COMMANDS[engine]} {SPREAD[engine]}")
        _, report = plan(folder, "--engine-version", BEST[engine], "--device", device, "--", *words)
        assert report["runtime"]["served"] == served, report["runtime"]["detail"]
    # The control: on a CPU it is no matter of speed.
    assert report["runtime"]["reason"] == "parallel.ep"


@pytest.mark.parametrize("engine", SPREAD)
def test_who_runs_quantised_experts_is_not_known_without_the_engine(engine: str, tmp_path: Path) -> None:
    folder = checkpoint("qwen3.5-fp8-block-mtp", tmp_path)
    given = {"vllm": "--moe-backend triton", "sglang": "--moe-runner-backend triton"}[engine]
    for flags, reason in (
        (SPREAD[engine], "backend.layout"),
        (f"{SPREAD[engine]} {given}", None),
    ):
        words = shlex.split(f"FSE_PATCH_ALLOW_UNPROVEN=1 {COMMANDS[engine]} {flags}")
        _, report = plan(folder, "--engine-version", BEST[engine], "--device", "NVIDIA H200", "--", *words)
        assert report["runtime"]["reason"] == reason, report["runtime"]["detail"]


def test_adapters_of_a_launch_are_looked_at(tmp_path: Path) -> None:
    folder, adapter = checkpoint("qwen3.5_35b_text", tmp_path), tmp_path / "adapter"
    adapter.mkdir()
    words = shlex.split(f"{COMMANDS['sglang']} --lora-paths first={adapter} {adapter}")
    for module, reason in (("o_proj", None), ("down_proj", "lora")):
        (adapter / "adapter_config.json").write_text(json.dumps({"target_modules": [module]}))
        _, report = plan(folder, "--engine-version", BEST["sglang"], "--device", "NVIDIA H200", "--", *words)
        assert report["runtime"]["reason"] == reason, report["runtime"]["detail"]
