"""Whatever stands in a checkpoint or a policy, the answer is a decision or an FsePatchError of one line."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.decision.decide import decide_roles
from fse_patch.fusion_core.decision.policy_file import DEFAULT_POLICY, load_policy, read_rules

from .checkpoints import CONFIGS, config_of, mlp_tensors, model_tensors, with_scales, write_checkpoint
from .outcomes import code

POLICY = load_policy()
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 70), st.integers(), st.floats(), st.text(max_size=4)
)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3)
)
KEYS = sorted(
    {key for config in CONFIGS.values() for key in config.get("text_config", config)}
    | {
        "text_config",
        "quantization_config",
        "compression_config",
        "num_nextn_predict_layers",
        "norm_topk_prob",
    }
)
QUANT_KEYS = ["quant_method", "weight_block_size", "bits", "format", "quant_algo", "global_quant_config"]


def answers(folder: Path) -> str:
    """The reason code, or "error"; anything else raised fails the test."""
    try:
        return code(decide_roles(folder, "vllm", POLICY)["main"])
    except FsePatchError as error:
        message = str(error)
    assert "\n" not in message
    return "error"


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(CONFIGS)),
    st.dictionaries(st.sampled_from(KEYS), values, max_size=3),
    st.booleans(),
)
def test_any_config(family: str, changes: dict[str, Any], headers: bool) -> None:
    config = config_of(family)
    config.get("text_config", config).update(changes)
    with tempfile.TemporaryDirectory() as folder:
        tensors = model_tensors(family) if headers else None
        assert answers(write_checkpoint(Path(folder), config, tensors))


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(QUANT_KEYS), values, max_size=3))
def test_any_quantisation_refuses_or_is_an_error(section: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = config_of("qwen2_moe") | {"quantization_config": section}
        reason = answers(write_checkpoint(Path(folder), config, model_tensors("qwen2_moe")))
        # An empty object leaves weights plain; everything else differs from the BF16 that is there.
        expected = reason == "error" or reason.startswith("quant.") if section else reason == "ok"
        assert expected, reason


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_byte_of_a_header_may_be_wrong(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = write_checkpoint(Path(name), config_of("qwen2_moe"), mlp_tensors("model.layers.0."))
        path = next(folder.glob("*.safetensors"))
        raw = bytearray(path.read_bytes())
        end = 8 + int.from_bytes(raw[:8], "little")
        for at, byte in data.draw(
            st.lists(st.tuples(st.integers(0, end - 1), st.integers(0, 255)), min_size=1, max_size=4)
        ):
            raw[at] = byte
        path.write_bytes(raw)
        assert answers(folder)


shapes = st.lists(st.integers(0, 65), max_size=4).map(tuple)
dtypes = st.sampled_from(["BF16", "F32", "F8_E4M3", "I32", "U8"])
suffixes = st.sampled_from(
    ["weight", "weight_scale", "weight_scale_inv", "qweight", "scale", "bias", "blocks"]
)
owners = st.sampled_from(
    ["shared_expert.", "experts.", "experts.0.", "experts.3.", "experts.4.", "shared_experts.", "experts"]
)
projections = st.sampled_from(["gate_proj", "up_proj", "down_proj", "gate_up_proj"])


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([None, 16]),
    st.booleans(),
    st.lists(st.tuples(owners, projections, suffixes, dtypes, shapes), min_size=1, max_size=3),
)
def test_any_tensor_beside_the_right_ones(
    block: int | None, stacked: bool, extra: list[tuple[str, str, str, str, tuple[int, ...]]]
) -> None:
    tensors = model_tensors("qwen3_next", stacked=stacked)
    if block is not None and not stacked:
        tensors = with_scales(tensors, block)
    for owner, projection, suffix, dtype, shape in extra:
        tensors[f"model.layers.1.mlp.{owner}{projection}.{suffix}"] = (dtype, shape)
    with tempfile.TemporaryDirectory() as folder:
        assert answers(write_checkpoint(Path(folder), config_of("qwen3_next"), tensors))


def test_a_packed_weight_without_elements_is_not_cut_into_blocks(tmp_path: Path) -> None:
    tensors = with_scales(model_tensors("qwen3_next"), 16)
    packed = {n: ("U8", shape) for n, (_, shape) in tensors.items() if n.endswith("_proj.weight")}
    name = next(n for n in packed if n.endswith("shared_expert.up_proj.weight"))
    packed[name] = ("U8", (0, packed[name][1][1]))
    assert answers(write_checkpoint(tmp_path, config_of("qwen3_next"), tensors | packed)) == "quant.mixed"


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_line_of_a_policy_may_be_wrong(data: st.DataObject) -> None:
    lines = DEFAULT_POLICY.read_text().splitlines()
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(lines) - 1))
        lines[at] = data.draw(
            st.sampled_from(
                ["", "  - {}", "rules:", "    when: [a]", "    fuse: 1", "?", "    x: &a [*a]", "%"]
            )
            | st.text(max_size=12)
            | values.map(json.dumps)
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "own.yaml")
        path.write_text("\n".join(lines), encoding="utf-8", errors="replace")
        try:
            rules, message = read_rules(path), ""
        except FsePatchError as error:
            rules, message = (), str(error)
        assert bool(message) == message.startswith(f"{path}: line ")
        assert "\n" not in message
        assert all(rule.fuse == (rule.reason == "ok") for rule in rules)
