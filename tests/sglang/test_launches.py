"""`fse-patch plan -- python -m sglang.launch_server ...` says what SGLang itself would do."""

from __future__ import annotations

import json

import pytest

from ..launches import differences, planned
from ..vllm.processes import in_process
from ..vllm.test_launches import check_flags
from .conftest import Runs

SERVE = "python -m sglang.launch_server --model-path {m} --dtype float32"
# Of a CPU for tests: its weights are read from copies.
PAIRED = f"FSE_PATCH_LAYOUT=paired FSE_PATCH_CPU_THRESHOLD=4 {SERVE}"
FEW = [
    SERVE,
    PAIRED,
    f"{SERVE} --disable-shared-experts-fusion",
    f"{SERVE} --load-format sharded_state",
    f"{SERVE} --json-model-override-args '{{{{\"num_experts_per_tok\": 1}}}}'",
]
MANY = [
    f"{SERVE} --tp 2",
    f"{SERVE} --tp-size 2 --ep-size 2",
    f"{SERVE} --tensor-parallel-size=2 --expert-parallel-size=2",
    f"{SERVE} --enable-eplb --tp 2 --ep 2",
    f"{SERVE} --dp-size 2",
    f"{SERVE} --pp-size 2",
    f"{SERVE} --enable-return-routed-experts",
    f"{SERVE} --expert-distribution-recorder-mode stat",
    f"{SERVE} --enable-lora --max-lora-rank 8 --lora-target-modules q_proj",
    f"{SERVE} --load-format safetensors",
    f"{SERVE} --load-format dummy",
    f"{SERVE} --load-format pt",
    f"{SERVE} --json-model-override-args '{{{{\"mlp_only_layers\": [0]}}}}'",
    f"{SERVE} --json-model-override-args '{{{{\"max_position_embeddings\": 64}}}}'",
    f"{SERVE} --disable-cuda-graph --chunked-prefill-size -1",
    f"{SERVE} --moe-runner-backend triton",
    f"{SERVE} --kt-weight-path /nowhere",
    f"{SERVE} --random-seed 3 --mem-fraction-static 0.3",
    f"{SERVE} --enable-mixed-chunk",
    f"{SERVE} --disable-radix-cache --max-running-requests 8",
    f"{SERVE} --lora-paths a=/nowhere",
    f"{SERVE} --cpu-offload-gb 1",
    f"{SERVE} --enable-memory-saver",
    f"{SERVE} --quantization bitsandbytes",
    f"{SERVE} --ep-num-redundant-experts 2",
    f"{SERVE} --tp 2 --dp 2 --enable-dp-attention",
    f"{SERVE} --tp 3",
    f"{SERVE} --tp 3 --ep 3",
    f"{SERVE} --tp 6 --ep 2",
    # It has no tensorizer.
    *(f"{SERVE} --load-format {name}" for name in ("bitsandbytes", "gguf", "layered", "runai_streamer")),
    f"{SERVE} --enable-waterfill",
    f"{SERVE} --enable-dp-attention --tp 2 --dp 2",
    f"{SERVE} --moe-a2a-backend deepep --tp 2",
    f"SGLANG_SIMULATE_UNIFORM_EXPERTS=1 {SERVE}",
    f'{SERVE} --json-model-override-args \'{{{{"approximate_experts": {{{{"0": [1]}}}}}}}}\'',
    f"SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED=1 {SERVE}",
    f"FSE_PATCH_LAYOUT=merged {SERVE}",
    f"FSE_PATCH_LAYOUT=paired {SERVE}",
    f"{PAIRED} --disable-shared-experts-fusion",
    f"{PAIRED} --enable-two-batch-overlap",
    f"{PAIRED} --enable-single-batch-overlap",
    f"{PAIRED} --enable-symm-mem",
    f"{PAIRED} --moe-runner-backend flashinfer_cutlass",
    f"{PAIRED} --tp 2 --ep-size 2",
    f"{PAIRED} --dp-size 2",
]


def check(commands: list[str], runs: Runs) -> None:
    folder = runs.checkpoints.path("qwen2_moe")
    found = in_process("tests.sglang.launches:probe", str(folder), json.dumps(commands), FSE_PATCH="sglang")
    assert differences(commands, folder, found) == []


def test_few_launches(runs: Runs) -> None:
    check(FEW, runs)
    # The control: said of another launch, it is seen.
    folder = runs.checkpoints.path("qwen2_moe")
    assert differences([FEW[2]], folder, [{"reason": "ok", "layout": "merged"}]) != []
    assert differences([FEW[1]], folder, [{"reason": "ok", "layout": "merged"}]) != []
    assert planned(FEW[2], folder)["reason"] == "disabled"


@pytest.mark.long
def test_many_more(runs: Runs) -> None:
    check(MANY, runs)


@pytest.mark.every_release
def test_flags_are_those_of_the_release() -> None:
    check_flags("sglang")
