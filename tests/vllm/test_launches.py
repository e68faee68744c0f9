"""`fse-patch plan -- vllm serve ...` says what vLLM itself would do with these words."""

from __future__ import annotations

import json

import pytest

from ..launches import differences, planned
from .engine import Checkpoints
from .processes import in_process

# Of a CPU for tests: its weights are read from copies.
PAIRED = "FSE_PATCH_LAYOUT=paired FSE_PATCH_CPU_THRESHOLD=4"
FEW = [
    "vllm serve {m}",
    f"{PAIRED} vllm serve {{m}}",
    "vllm serve {m} --enable-lora --max-lora-rank 8",
    "vllm serve {m} --load_format=runai_streamer_sharded",
    "vllm serve {m} --hf-overrides '{{\"num_experts_per_tok\": 1}}'",
]
MANY = [
    "vllm serve {m} --dtype bfloat16 --max-model-len 128",
    "vllm serve {m} -q fp8",
    "vllm serve {m} --quantization=int8_per_channel_weight_only",
    "vllm serve {m} --load-format dummy",
    "vllm serve {m} --load-format safetensors",
    "vllm serve {m} --load-format pt",
    "vllm serve {m} --tensor-parallel-size 2",
    "vllm serve {m} -tp 2 --enable-expert-parallel",
    "vllm serve {m} -tp 2 -ep --no-enable-expert-parallel",
    "vllm serve {m} --data-parallel-size 2",
    "vllm serve {m} -dp 2 -ep",
    "vllm serve {m} --all2all-backend allgather_reducescatter",
    'vllm serve {m} --weight-transfer-config \'{{"backend": "nccl"}}\'',
    "vllm serve {m} --hf-overrides '{{\"max_position_embeddings\": 64}}'",
    "vllm serve {m} --hf-overrides '{{\"mlp_only_layers\": [0]}}'",
    "vllm serve {m} --hf-overrides.decoder_sparse_step 2",
    "vllm serve --model {m} --enforce-eager -O0",
    "vllm serve {m} --pipeline-parallel-size 2",
    "vllm serve {m} --moe-backend triton --seed 3",
    "vllm serve {m} --enable-lora --no-enable-lora",
    "vllm serve {m} -tp 2 --enable-lora --max-lora-rank 8 --lora-target-modules q_proj o_proj",
    "vllm serve {m} --enable-lora --lora-target-modules q_proj down_proj",
    "vllm serve {m} --cpu-offload-gb 1",
    "vllm serve {m} --offload-group-size 2",
    # On a CPU vLLM itself ends with --enable-sleep-mode, --enable-eplb, --quantization bitsandbytes.
    *(
        f"vllm serve {{m}} --load-format {name}"
        for name in ("sharded_state", "tensorizer", "bitsandbytes", "gguf", "instanttensor", "runai_streamer")
    ),
    "vllm serve {m} --enable-expert-parallel",
    "vllm serve {m} --cpu-offload-gb 1 --enable-lora",
    "vllm serve {m} --moe-backend marlin",
    "vllm serve {m} --dtype half",
    'vllm serve {m} --hf-overrides \'{{"approximate_experts": {{"0": [1]}}}}\'',
    "FSE_PATCH_LAYOUT=merged vllm serve {m}",
    "FSE_PATCH_LAYOUT=paired vllm serve {m}",
    f"{PAIRED} vllm serve {{m}} -tp 2 --enable-expert-parallel",
    f"{PAIRED} vllm serve {{m}} --enable-lora",
    f'{PAIRED} vllm serve {{m}} --weight-transfer-config \'{{{{"backend": "nccl"}}}}\'',
    f"{PAIRED} VLLM_MOE_ROUTING_SIMULATION_STRATEGY=uniform_random vllm serve {{m}}",
    f"{PAIRED} VLLM_BATCH_INVARIANT=1 vllm serve {{m}}",
]


def check(commands: list[str], checkpoints: Checkpoints) -> None:
    folder = checkpoints.path("qwen2_moe")
    found = in_process("tests.vllm.launches:probe", str(folder), json.dumps(commands))
    assert differences(commands, folder, found) == []


def test_few_launches(checkpoints: Checkpoints) -> None:
    check(FEW, checkpoints)
    # The control: said of another launch, it is seen.
    folder = checkpoints.path("qwen2_moe")
    assert differences([FEW[2]], folder, [{"reason": "ok", "layout": "merged"}]) != []
    assert differences([FEW[1]], folder, [{"reason": "ok", "layout": "merged"}]) != []
    assert planned(FEW[2], folder)["reason"] == "lora"


@pytest.mark.long
def test_many_more(checkpoints: Checkpoints) -> None:
    check(MANY, checkpoints)


@pytest.mark.every_release
def test_flags_are_those_of_the_release() -> None:
    check_flags("vllm")


def check_flags(engine: str) -> None:
    """patches/<engine>.flags.json has this release as it is; `python ci/launch_flags.py --write` makes it."""
    import sys

    import launch_flags

    from fse_patch.launch.flags import flags_of

    version, rows = launch_flags.flags_of(engine, sys.executable)
    data = flags_of(engine)
    assert version in data.releases
    held = [
        f.model_dump(exclude={"releases"}) for f in data.flags if version in (f.releases or data.releases)
    ]
    assert sorted(held, key=json.dumps) == sorted(rows, key=json.dumps)
