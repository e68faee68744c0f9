"""The words for a value of config.json that does not fit, and the smallest and largest that do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.checkpoint.config import ConfigFile, moe_of
from fse_patch.fusion_core.checkpoint.families import family_of

from .checkpoints import CONFIGS, config_of, write_checkpoint
from .test_config import read

MANY = 1 << 24


def whole(low: int, high: int = MANY) -> str:
    return f"a whole number from {low} to {high}"


@pytest.mark.parametrize(
    ("family", "key", "value", "expected"),
    [
        ("qwen2_moe", "num_hidden_layers", 0, whole(1, 10_000)),
        ("qwen2_moe", "num_hidden_layers", 10_001, whole(1, 10_000)),
        ("qwen2_moe", "num_experts", -1, whole(0)),
        ("qwen2_moe", "num_experts", MANY + 1, whole(0)),
        ("qwen2_moe", "num_experts_per_tok", 0, whole(1)),
        ("qwen2_moe", "num_experts_per_tok", 5, "at most the 4 experts of 'num_experts'"),
        ("qwen2_moe", "hidden_size", 0, whole(1)),
        ("qwen2_moe", "moe_intermediate_size", 0, whole(1)),
        ("qwen2_moe", "shared_expert_intermediate_size", -1, whole(0)),
        ("qwen2_moe", "decoder_sparse_step", 0, whole(1)),
        ("qwen2_moe", "mlp_only_layers", [-1], "a list of whole numbers"),
        ("qwen2_moe", "hidden_act", 3, "a string"),
        ("qwen2_moe", "norm_topk_prob", 1, "true or false"),
        ("qwen3_next", "num_nextn_predict_layers", 10_001, whole(0, 10_000)),
        ("glm4_moe", "n_routed_experts", "4", whole(0)),
        ("glm4_moe", "n_shared_experts", "1", whole(0)),
        ("glm4_moe", "first_k_dense_replace", -1, whole(0)),
        ("glm4_moe", "n_group", 0, whole(1)),
        ("glm4_moe", "n_group", 3, "a divisor of the 4 experts"),
        ("glm4_moe", "topk_group", 0, whole(1)),
        ("glm4_moe", "topk_group", 2, "at most the 1 groups of 'n_group'"),
        ("glm4_moe", "routed_scaling_factor", 0, "a number above 0"),
    ],
)
def test_a_value_that_does_not_fit(
    tmp_path: Path, family: str, key: str, value: object, expected: str
) -> None:
    with pytest.raises(FsePatchError) as error:
        read(tmp_path, config_of(family, **{key: value}))
    assert str(error.value) == f"{tmp_path}/config.json: '{key}' is {value!r}; expected {expected}"


@pytest.mark.parametrize(
    ("family", "key", "expected"),
    [
        ("qwen2_moe", "num_hidden_layers", whole(1, 10_000)),
        ("qwen2_moe", "num_experts", whole(0)),
        ("qwen2_moe", "shared_expert_intermediate_size", whole(0)),
        ("glm4_moe", "first_k_dense_replace", whole(0)),
        ("glm4_moe", "n_shared_experts", whole(0)),
    ],
)
def test_a_value_that_is_missing(tmp_path: Path, family: str, key: str, expected: str) -> None:
    with pytest.raises(FsePatchError) as error:
        read(tmp_path, config_of(family, **{key: None}))
    assert str(error.value) == f"{tmp_path}/config.json: has no '{key}'; expected {expected}"


@pytest.mark.parametrize(
    ("family", "key", "values", "field"),
    [
        ("qwen2_moe", "hidden_size", (1, MANY), "hidden_size"),
        ("qwen2_moe", "moe_intermediate_size", (1, MANY), "moe_intermediate_size"),
        ("qwen2_moe", "shared_expert_intermediate_size", (0, MANY), "shared_intermediate_size"),
        ("qwen2_moe", "num_hidden_layers", (1, 10_000), "num_hidden_layers"),
        ("qwen2_moe", "num_experts", (0, MANY), "num_routed"),
        ("qwen2_moe", "num_experts_per_tok", (1, 4), "top_k"),
        ("glm4_moe", "n_group", (1, 4), "num_expert_group"),
    ],
)
def test_the_smallest_and_the_largest(
    tmp_path: Path, family: str, key: str, values: tuple[int, ...], field: str
) -> None:
    for value in values:
        assert getattr(read(tmp_path, config_of(family, **{key: value})), field) == value


def test_all_groups_may_be_taken(tmp_path: Path) -> None:
    assert read(tmp_path, config_of("glm4_moe", n_group=2, topk_group=2)).topk_group == 2


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": 3}, "'model_type' is 3; expected a string"),
        ({"text_config": 3}, "'text_config' is 3; expected an object"),
        ({"quantization_config": 3}, "'quantization_config' is 3; expected an object"),
        ({"compression_config": [3]}, "'compression_config' is [3]; expected an object"),
        (
            {"quantization_config": {"quant_method": 3}},
            "'quantization_config.quant_method' is 3; expected a string",
        ),
        (
            {"text_config": {"compression_config": {"weight_block_size": [128]}}},
            "'text_config.compression_config.weight_block_size' is [128]; expected two whole numbers above 0",
        ),
        (
            {"quantization_config": {"weight_block_size": "128"}},
            "'quantization_config.weight_block_size' is '128'; expected a list of whole numbers",
        ),
    ],
)
def test_a_declaration_that_does_not_fit(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    with pytest.raises(FsePatchError) as error:
        ConfigFile(write_checkpoint(tmp_path, config, None)).quantisations()
    assert str(error.value) == f"{tmp_path}/config.json: {words}"


def test_the_source_of_a_running_config_is_named() -> None:
    family = family_of("qwen2_moe")
    assert family is not None
    with pytest.raises(FsePatchError) as error:
        moe_of(family, CONFIGS["qwen2_moe"] | {"hidden_size": 0}, "the engine's config")
    assert str(error.value) == f"the engine's config: 'hidden_size' is 0; expected {whole(1)}"


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(FsePatchError) as error:
        ConfigFile(tmp_path)
    assert str(error.value) == f"{tmp_path}: has no config.json; give the folder of a checkpoint"
