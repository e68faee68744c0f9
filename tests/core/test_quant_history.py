"""Keys that tell how weights came about are read over; keys that nobody has listed are not."""

from __future__ import annotations

from typing import Any

import pytest

from fse_patch.fusion_core.quant.claims import Doubt

from .test_quant_claims import SHARED, claim

# Keys as tools write them, with a value of theirs.
HISTORY: dict[str, dict[str, Any]] = {
    "gptq": {
        "lm_head": False, "meta": {"quantizer": ["gptqmodel:7.7.0"]}, "pack_dtype": "int32",
        "damp_percent": 0.05, "damp_auto_increment": 0.01, "static_groups": False, "true_sequential": True,
        "mse": 0.0, "model_name_or_path": "", "model_file_base_name": "model", "model_seqlen": 4096,
        "pad_token_id": 0, "tokenizer": "x", "dataset": "c4", "max_input_length": 64, "use_exllama": True,
        "backend": "auto", "batch_size": 1, "cache_block_outputs": True, "act_group_aware": True,
        "block_name_to_quantize": "model.layers", "module_name_preceding_first_block": ["model.embed"],
    },
    "auto-round": {
        "autoround_version": "0.16.1", "amp": True, "batch_size": 8, "iters": 200, "lr": 0.005,
        "minmax_lr": 0.005, "nsamples": 128, "seqlen": 2048, "enable_minmax_tuning": True,
        "enable_norm_bias_tuning": False, "enable_quanted_input": True, "gradient_accumulate_steps": 1,
        "low_gpu_mem_usage": False, "scale_dtype": "torch.float16", "static_attention_dtype": "fp8",
        "static_attention_granularity": "tensor", "static_kv_dtype": "fp8", "static_kv_granularity": "head",
        "model_free": True, "provider": "auto-round", "rotation_config": {},
    },
}  # fmt: skip


def test_a_null_in_an_override_of_auto_round_says_nothing() -> None:
    change = {"bits": 8, "group_size": None, "act_bits": None, "super_bits": None, "rotation_config": None}
    made = claim("inc", SHARED, bits=4, group_size=32, extra_config={SHARED: change})
    assert (made.bits, made.group) == (8, (1, 32))


@pytest.mark.parametrize("method", ["gptq", "awq", "inc", "fp8"])
def test_writers_keys_are_read_over_and_others_are_not(method: str) -> None:
    spec: dict[str, Any] = {} if method == "fp8" else {"bits": 4, "group_size": 32}
    bare = claim(method, **spec)
    written = HISTORY["auto-round"] | (HISTORY["gptq"] if method in ("gptq", "awq") else {})
    assert claim(method, **spec, **written) == bare
    for key in written:
        with pytest.raises(Doubt, match=f"'{key}_of_tomorrow' is not known"):
            claim(method, **spec, **{f"{key}_of_tomorrow": written[key]})
