"""config.json: every value that a decision rests on is type checked, and errors name the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.checkpoint.config import ConfigFile, MoeConfig, QuantConfig
from fse_patch.fusion_core.checkpoint.families import family_of

from .checkpoints import CONFIGS, MOE_LAYERS, config_of, write_checkpoint


def read(folder: Path, config: dict[str, Any]) -> MoeConfig:
    file = ConfigFile(write_checkpoint(folder, config, None))
    family = family_of(file.model_type)
    assert family is not None
    return file.moe(family)


@pytest.mark.parametrize("family", CONFIGS)
def test_sizes_and_layers_of_every_family(tmp_path: Path, family: str) -> None:
    moe = read(tmp_path, config_of(family))
    assert (moe.num_routed, moe.top_k, moe.hidden_size, moe.moe_intermediate_size) == (4, 2, 64, 32)
    assert moe.num_shared_slots == 1
    assert list(moe.main_layers) == MOE_LAYERS[family]
    assert moe.draft_layers == ()


@pytest.mark.parametrize("value", ["4", True, -1, 4.0, [4], {}, 10**9])
@pytest.mark.parametrize("key", ["num_experts", "moe_intermediate_size", "num_hidden_layers", "hidden_size"])
def test_a_count_is_a_whole_number(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(FsePatchError, match=rf"config\.json: '{key}' is .*; expected a whole number"):
        read(tmp_path, config_of("qwen2_moe", **{key: value}))


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("glm4_moe", "norm_topk_prob", 1),
        ("glm4_moe", "routed_scaling_factor", "2.5"),
        ("glm4_moe", "routed_scaling_factor", True),
        ("glm4_moe", "routed_scaling_factor", 0),
        ("glm4_moe", "routed_scaling_factor", float("nan")),
        ("glm4_moe", "n_group", 3),
        ("glm4_moe", "topk_group", 2),
        ("glm4_moe", "num_nextn_predict_layers", "1"),
        ("glm4_moe", "first_k_dense_replace", [1]),
        ("glm4_moe", "num_experts_per_tok", 5),
        ("qwen2_moe", "mlp_only_layers", "0"),
        ("qwen2_moe", "mlp_only_layers", [True]),
        ("qwen2_moe", "decoder_sparse_step", 0),
        ("qwen2_moe", "hidden_act", 3),
        ("qwen2_moe", "shared_expert_intermediate_size", "32"),
    ],
)
def test_other_values_are_checked_too(tmp_path: Path, family: str, key: str, value: object) -> None:
    with pytest.raises(FsePatchError, match=f"'{key}' is "):
        read(tmp_path, config_of(family, **{key: value}))


@pytest.mark.parametrize("key", ["num_experts", "num_experts_per_tok", "shared_expert_intermediate_size"])
def test_a_missing_value_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(FsePatchError, match=f"has no '{key}'"):
        read(tmp_path, config_of("qwen2_moe", **{key: None}))


def test_nested_keys_are_named_with_their_section(tmp_path: Path) -> None:
    with pytest.raises(FsePatchError, match=r"'text_config\.num_experts' is '8'"):
        read(tmp_path, config_of("qwen3_5_moe", num_experts="8"))
    with pytest.raises(FsePatchError, match="'text_config' is 3; expected an object"):
        read(tmp_path, {"model_type": "qwen3_5_moe", "text_config": 3})


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"decoder_sparse_step": 2}, (1, 3)),
        ({"mlp_only_layers": [0, 3]}, (1, 2)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, (3,)),
    ],
)
def test_sparse_layers_by_step_and_list(
    tmp_path: Path, changes: dict[str, Any], layers: tuple[int, ...]
) -> None:
    assert read(tmp_path, config_of("qwen2_moe", num_hidden_layers=4, **changes)).main_layers == layers
    # Qwen3.5 builds every layer sparse, whatever these keys say.
    other = read(tmp_path, config_of("qwen3_5_moe", num_hidden_layers=4, **changes))
    assert other.main_layers == (0, 1, 2, 3)


def test_draft_layers_are_numbered_as_checkpoints_number_them(tmp_path: Path) -> None:
    assert read(tmp_path, config_of("qwen3_5_moe", mtp_num_hidden_layers=1)).draft_layers == (0,)
    assert read(tmp_path, config_of("qwen3_next", num_nextn_predict_layers=2)).draft_layers == (0, 1)
    assert read(tmp_path, config_of("glm4_moe", num_nextn_predict_layers=2)).draft_layers == (3, 4)


def test_only_families_that_scale_and_group_read_those_keys(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"routed_scaling_factor": 2.5, "n_group": 2, "topk_group": 1}
    glm = read(tmp_path, config_of("glm4_moe", **keys))
    assert (glm.routed_scaling_factor, glm.num_expert_group) == (2.5, 2)
    qwen = read(tmp_path, config_of("qwen2_moe", **keys))
    assert (qwen.routed_scaling_factor, qwen.num_expert_group) == (1.0, 1)


def test_defaults_follow_the_family(tmp_path: Path) -> None:
    assert read(tmp_path, config_of("qwen2_moe")).renormalize is False
    assert read(tmp_path, config_of("qwen3_next")).renormalize is True
    assert read(tmp_path, config_of("glm4_moe", routed_scaling_factor=None)).routed_scaling_factor == 1.0


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 64]}, ("fp8", "block", (128, 64))),
        ({"quant_method": "awq", "bits": 4}, ("awq", "int4", None)),
        ({"quant_method": "compressed_tensors", "format": "Pack"}, ("compressed-tensors", "pack", None)),
        (
            {"quant_method": "quark", "global_quant_config": {"weight": [{"dtype": "fp4"}]}},
            ("quark", "fp4", None),
        ),
        ({"bits": 4}, ("unnamed", "int4", None)),
    ],
)
def test_declared_quantisation(
    tmp_path: Path, section: dict[str, Any], expected: tuple[str, str, tuple[int, int] | None]
) -> None:
    for config in (
        config_of("qwen2_moe", quantization_config=section),
        config_of("qwen3_5_moe") | {"quantization_config": section},
        config_of("qwen3_5_moe", quantization_config=section),
    ):
        quant = ConfigFile(write_checkpoint(tmp_path, config, None)).quantisations()[0]
        assert (quant.method, quant.scheme, quant.block) == expected


def test_quantisation_elsewhere(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, config_of("qwen2_moe"), None)
    assert ConfigFile(tmp_path).quantisations()[0] == QuantConfig()
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    quant = ConfigFile(tmp_path).quantisations()[0]
    assert (quant.method, quant.scheme, quant.source) == ("modelopt", "nvfp4", "hf_quant_config.json")
    write_checkpoint(tmp_path, config_of("qwen2_moe", compression_config={"format": "x"}), None)
    assert ConfigFile(tmp_path).quantisations()[0].method == "compressed-tensors"


@pytest.mark.parametrize("block", [[128], [0, 128], "128", [128, "128"], 128])
def test_a_block_is_two_sizes(tmp_path: Path, block: object) -> None:
    config = config_of("qwen2_moe", quantization_config={"quant_method": "fp8", "weight_block_size": block})
    with pytest.raises(FsePatchError, match=r"'quantization_config\.weight_block_size' is "):
        ConfigFile(write_checkpoint(tmp_path, config, None)).quantisations()[0]


NULLS = [
    ("qwen2_moe", "shared_expert_intermediate_size"),
    ("qwen3_next", "shared_expert_intermediate_size"),
    ("glm4_moe", "n_shared_experts"),
]


def with_null(family: str, key: str) -> dict[str, Any]:
    config = config_of(family)
    config.get("text_config", config)[key] = None
    return config


@pytest.mark.parametrize(("family", "key"), NULLS)
def test_a_shared_expert_of_null_is_none_and_a_missing_key_is_a_fault(
    tmp_path: Path, family: str, key: str
) -> None:
    moe = read(tmp_path, with_null(family, key))
    assert (moe.shared_intermediate_size, moe.num_shared_slots) == (0, None)
    with pytest.raises(FsePatchError, match=f"has no '{key}'"):
        read(tmp_path, config_of(family, **{key: None}))


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("qwen3_next", "num_nextn_predict_layers"),
        ("glm4_moe", "num_nextn_predict_layers"),
        ("qwen3_5_moe", "mtp_num_hidden_layers"),
    ],
)
def test_a_count_of_draft_layers_of_null_is_none(tmp_path: Path, family: str, key: str) -> None:
    assert read(tmp_path, with_null(family, key)).draft_layers == ()
    assert read(tmp_path, config_of(family)).draft_layers == ()
    assert len(read(tmp_path, config_of(family, **{key: 1})).draft_layers) == 1


@pytest.mark.parametrize(
    ("family", "key", "number"),
    [
        ("qwen2_moe", "decoder_sparse_step", 1),
        ("glm4_moe", "n_group", 1),
        ("glm4_moe", "topk_group", 1),
        ("glm4_moe", "routed_scaling_factor", 1.0),
        ("qwen2_moe", "mlp_only_layers", []),
    ],
)
def test_other_nulls_are_as_if_nothing_was_said(tmp_path: Path, family: str, key: str, number: Any) -> None:
    assert read(tmp_path, with_null(family, key)) == read(tmp_path, config_of(family, **{key: number}))


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_experts", "num_experts_per_tok", "hidden_size"])
def test_a_count_that_must_be_there_is_no_null(tmp_path: Path, key: str) -> None:
    with pytest.raises(FsePatchError, match=f"'{key}' is None; expected a whole number"):
        read(tmp_path, with_null("qwen3_next", key))


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({}, ("none", "")),
        (None, ("none", "")),
        ({"bits": None}, ("unnamed", "")),
        ({"x": 1}, ("unnamed", "")),
    ],
)
def test_an_empty_object_declares_nothing(
    tmp_path: Path, section: dict[str, Any] | None, expected: tuple[str, str]
) -> None:
    config = config_of("qwen2_moe") | {"quantization_config": section}
    (quant,) = ConfigFile(write_checkpoint(tmp_path, config, None)).quantisations()
    assert (quant.method, quant.scheme) == expected
    # Engines take it for an answer where it is an object, and look further at null.
    assert quant.source == ("" if section is None else "config.json: quantization_config")


def test_a_gguf_file_is_taken_whatever_is_declared(tmp_path: Path) -> None:
    config = config_of("qwen2_moe", quantization_config={"quant_method": "fp8"})
    write_checkpoint(tmp_path, config, None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    found = [(quant.method, quant.source) for quant in ConfigFile(tmp_path).quantisations()]
    assert found == [("fp8", "config.json: quantization_config"), ("gguf", "*.gguf")]
    write_checkpoint(tmp_path, config, {})
    assert [quant.method for quant in ConfigFile(tmp_path).quantisations()] == ["fp8"]


def test_a_scale_that_is_not_named_is_that_of_the_family(tmp_path: Path) -> None:
    config = config_of("glm4_moe", routed_scaling_factor=None)
    assert read(tmp_path, config).routed_scaling_factor == 1.0
    lite = {**config, "model_type": "glm4_moe_lite"}
    assert read(tmp_path, lite).routed_scaling_factor == 1.8
    assert read(tmp_path, {**lite, "routed_scaling_factor": 2.5}).routed_scaling_factor == 2.5
