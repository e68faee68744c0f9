"""The policy: golden decisions by quantisation, overlay, schema, errors by file, line and field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.decision import policy_file
from fse_patch.fusion_core.decision.decide import decide
from fse_patch.fusion_core.decision.policy import DEFAULT_DENY, Policy, PolicyFacts, When
from fse_patch.fusion_core.decision.policy_file import DEFAULT_POLICY, load_policy, read_rules
from fse_patch.fusion_core.evidence.specs import MlpSpec, TensorSpec

from .checkpoints import Tensors, config_of, model_tensors, with_scales, write_checkpoint
from .outcomes import code, merged


def packed(tensors: Tensors, where: str = "_proj") -> Tensors:
    """``tensors`` with the projections whose name contains ``where`` in 4-bit AWQ form."""
    result: Tensors = {}
    for name, (dtype, (out, inner)) in tensors.items():
        if where not in name or "_proj" not in name:
            result[name] = (dtype, (out, inner))
            continue
        stem = name.removesuffix("weight")
        result[f"{stem}qweight"] = ("I32", (inner, out // 8))
        result[f"{stem}scales"] = ("F16", (inner // 16, out))
        result[f"{stem}qzeros"] = ("I32", (inner // 16, out // 8))
    return result


PLAIN = model_tensors("qwen3_next")
FP8_BLOCK, FP8_TENSOR = with_scales(PLAIN, 16), with_scales(PLAIN, None)
SHARED_BF16 = {n: t for n, t in FP8_BLOCK.items() if ".shared_expert." not in n} | {
    n: t for n, t in PLAIN.items() if ".shared_expert." in n
}
BLOCK = {"quant_method": "fp8", "weight_block_size": [16, 16]}
QUARK_FP4 = {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp4"}}}

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16}
TENSOR = {"quant_method": "fp8"}
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
CT_INT8 = {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}, "targets": ["Linear"]}
INT8: Tensors = {
    **{n: ("I8" if "_proj" in n else t, s) for n, (t, s) in PLAIN.items()},
    **{f"{n}_scale": ("F32", (s[0], 1)) for n, (_, s) in PLAIN.items() if "_proj" in n},
}


def compressed(form: str, *groups: dict[str, Any]) -> dict[str, Any]:
    named = {f"group_{n}": group for n, group in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": named}


def grouped(form: str) -> dict[str, Any]:
    group = {"targets": ["Linear"], "format": form, "weights": {"num_bits": 4, "type": "float"}}
    return compressed("mixed-precision", group)


# quantisation of config.json, tensors -> (reason, rule)
GOLDEN: list[tuple[dict[str, Any] | None, Tensors | None, str, str]] = [
    (None, PLAIN, "ok", "unquantised"),
    (None, None, "ok", "unquantised-config-only"),
    (None, SHARED_BF16, "quant.mixed", "mixed"),
    (None, FP8_BLOCK, "quant.contradiction", "contradiction"),
    (BLOCK, FP8_BLOCK, "ok", "fp8"),
    (BLOCK, PLAIN, "quant.contradiction", "contradiction"),
    (BLOCK, FP8_TENSOR, "quant.contradiction", "contradiction"),
    (BLOCK, SHARED_BF16, "quant.mixed", "mixed"),
    (BLOCK, None, "quant.unknown", "quantised-config-only"),
    (TENSOR, FP8_TENSOR, "ok", "fp8"),
    (TENSOR, FP8_BLOCK, "quant.contradiction", "contradiction"),
    (AWQ, packed(PLAIN), "ok", "int4"),
    (AWQ, packed(PLAIN, ".experts."), "quant.mixed", "mixed"),
    (AWQ | {"group_size": 32}, packed(PLAIN), "quant.contradiction", "contradiction"),
    ({"quant_method": "gptq", "bits": 4}, packed(PLAIN), "quant.contradiction", "contradiction"),
    ({"quant_method": "auto-round", "bits": 4}, packed(PLAIN, ".experts."), "quant.mixed", "mixed"),
    (compressed("pack-quantized"), PLAIN, "ok", "unquantised"),
    (compressed("int-quantized", CT_INT8), INT8, "quant.unknown", "quantised"),
    (compressed("mxfp4-pack-quantized"), PLAIN, "quant.mxfp4", "compressed-tensors-mxfp4"),
    (grouped("mxfp4-pack-quantized"), PLAIN, "quant.mxfp4", "mxfp4-layer"),
    (grouped("nvfp4-pack-quantized"), PLAIN, "quant.nvfp4", "nvfp4-layer"),
    (NVFP4, PLAIN, "quant.nvfp4", "nvfp4"),
    (NVFP4, None, "quant.nvfp4", "nvfp4"),
    ({"quant_method": "brand-new"}, PLAIN, "quant.unknown", "not-understood"),
    ({}, PLAIN, "ok", "unquantised"),
    ({"quant_method": "quark"}, PLAIN, "quant.quark", "quark"),
    ({"quant_method": "quark"}, SHARED_BF16, "quant.quark", "quark"),
    (QUARK_FP4, PLAIN, "quant.mxfp4", "quark-mxfp4"),
    ({"quant_method": "mxfp4"}, SHARED_BF16, "quant.mxfp4", "mxfp4"),
]


@pytest.mark.parametrize(("quant", "tensors", "reason", "rule"), GOLDEN)
def test_golden_decisions(
    tmp_path: Path, quant: dict[str, Any] | None, tensors: Tensors | None, reason: str, rule: str
) -> None:
    folder = write_checkpoint(tmp_path, config_of("qwen3_next", quantization_config=quant), tensors)
    for engine in ("vllm", "sglang"):
        decision = decide(folder, engine)
        assert (code(decision), decision.rule) == (reason, rule), decision


def test_every_default_rule_is_in_a_golden_row() -> None:
    assert {row[3] for row in GOLDEN} == {rule.id for rule in load_policy().rules}


def test_every_default_rule_has_a_public_source() -> None:
    assert all(rule.source.startswith("https://github.com/") for rule in load_policy().rules)


MATRIX = (TensorSpec("weight", "BF16", "matrix"),)
SPEC = MlpSpec(MATRIX, MATRIX)
FACTS = PolicyFacts("none", "", "qwen2_moe", "vllm", "main", 4, SPEC, SPEC, "plain", "agrees")
NO_HEADERS = PolicyFacts("none", "", "qwen2_moe", "vllm", "main", 4)


def test_nothing_matches_means_deny() -> None:
    assert Policy(()).rule_for(FACTS) is DEFAULT_DENY
    assert (DEFAULT_DENY.fuse, DEFAULT_DENY.reason) == (False, "quant.unknown")


CONDITIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"quant_methods": ["none"]}, {"quant_methods": ["fp8"]}),
    ({"quant_schemes": [""]}, {"quant_schemes": ["block"]}),
    ({"formats": ["plain"]}, {"formats": ["fp8-block"]}),
    ({"config": ["agrees"]}, {"config": ["contradicts"]}),
    ({"families": ["qwen2_moe"]}, {"families": ["glm4_moe"]}),
    ({"engines": ["vllm"]}, {"engines": ["sglang"]}),
    ({"roles": ["main"]}, {"roles": ["draft"]}),
    ({"headers": True}, {"headers": False}),
    ({"dtypes": ["BF16", "F32"]}, {"dtypes": ["F32"]}),
    ({"suffixes": ["weight"]}, {"suffixes": []}),
    ({"specs_equal": True}, {"specs_equal": False}),
    ({"max_shared_slots": 4}, {"max_shared_slots": 3}),
]


@given(st.sets(st.sampled_from(range(len(CONDITIONS)))), st.sampled_from(range(len(CONDITIONS))))
def test_all_conditions_must_hold(chosen: set[int], broken: int) -> None:
    holding: dict[str, Any] = {}
    for number in chosen:
        holding |= CONDITIONS[number][0]
    assert When(**holding).matches(FACTS)
    assert not When(**{**holding, **CONDITIONS[broken][1]}).matches(FACTS)


def test_every_condition_is_tested() -> None:
    assert {key for holds, _ in CONDITIONS for key in holds} == set(When.model_fields)


@pytest.mark.parametrize("condition", [{"dtypes": ["BF16"]}, {"suffixes": ["weight"]}, {"specs_equal": True},
                                       {"specs_equal": False}, {"config": ["agrees"]}])  # fmt: skip
def test_conditions_on_tensors_never_hold_without_headers(condition: dict[str, Any]) -> None:
    assert not When(**condition).matches(NO_HEADERS)
    assert When(headers=False).matches(NO_HEADERS)


OWN = """\
version: 1
rules:
  - id: not-this-family
    when:
      families: [qwen3_next]
    fuse: false
    reason: disabled
    why: measured to be no use here
    source: notes.md
"""


def test_a_users_rules_come_first(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(OWN)
    policy = load_policy(own)
    assert [rule.id for rule in policy.rules] == ["not-this-family", *(r.id for r in load_policy().rules)]
    folder = write_checkpoint(tmp_path / "c", config_of("qwen3_next"), PLAIN)
    assert code(decide(folder, "vllm", policy=policy)) == "disabled"
    assert merged(decide(folder, "vllm"))
    other = write_checkpoint(tmp_path / "d", config_of("qwen2_moe"), model_tensors("qwen2_moe"))
    assert merged(decide(other, "vllm", policy=policy))
    assert decide(other, "vllm", policy=policy).policy_hash != decide(other, "vllm").policy_hash


@pytest.mark.parametrize(
    ("old", "new", "line", "field", "message"),
    [
        (
            "reason: disabled",
            "reason: because",
            7,
            "rules[0].reason",
            "Input should be 'ok', 'family.unknown'",
        ),
        ("reason: disabled", "reason: ok", 3, "rules[0]", "a rule that refuses names another code"),
        ("fuse: false", "fuse: true", 3, "rules[0]", "a rule that fuses has reason 'ok'"),
        ("fuse: false", "fuse: nope", 6, "rules[0].fuse", "valid boolean"),
        ("fuse: false", "fues: false", 6, "rules[0].fues", "unknown key; did you mean fuse?"),
        ("    why: measured to be no use here\n", "", 3, "rules[0].why", "required"),
        ("why: measured to be no use here", "why: ''", 8, "rules[0].why", "at least 1 character"),
        ("families: [qwen3_next]", "families: [qwen9]", 5, "rules[0].when.families", "'qwen9' is none of"),
        ("families: [qwen3_next]", "formats: [fp9]", 5, "rules[0].when.formats", "'fp9' is none of"),
        ("families: [qwen3_next]", "config: [maybe]", 5, "rules[0].when.config[0]", "should be 'agrees'"),
        ("families: [qwen3_next]", "engines: [vlm]", 5, "rules[0].when.engines", "'vlm' is none of"),
        ("families: [qwen3_next]", "families: qwen3_next", 5, "rules[0].when.families", "valid list"),
        (
            "families: [qwen3_next]",
            "familys: [qwen3_next]",
            5,
            "rules[0].when.familys",
            "unknown key; did you mean families?",
        ),
        (
            "families: [qwen3_next]",
            "max_shared_slots: 0",
            5,
            "rules[0].when.max_shared_slots",
            "greater than",
        ),
        ("version: 1", "version: 2", 1, "version", "should be 1"),
        ("id: not-this-family", "id: Not This", 3, "rules[0].id", "should match pattern"),
        ("source: notes.md", "source: notes.md\n    why: again", 10, "rules[0].why", "given twice"),
        ("families: [qwen3_next]", "families: [qwen3_next", 6, None, "not valid YAML"),
        ("version: 1", "\tversion: 1", 1, None, "not valid YAML"),
        ("version: 1", "version: !!python/object:os.system 1", 1, None, "not valid YAML"),
        ("version: 1", "? [a, b]\n: 1\nversion: 1", 1, None, "not valid YAML"),
        ("version: 1", "&a version: 1\nother: *b", 2, None, "not valid YAML"),
    ],
)
def test_a_malformed_policy_is_named_by_file_line_and_field(
    tmp_path: Path, old: str, new: str, line: int, field: str | None, message: str
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(OWN)
    assert len(read_rules(own)) == 1, "control: unchanged, the file is fine"
    own.write_text(OWN.replace(old, new, 1))
    with pytest.raises(FsePatchError) as caught:
        load_policy(own)
    text = str(caught.value)
    assert text.startswith(f"{own}: line {line}: ")
    assert message in text
    assert "\n" not in text
    if field is not None:
        assert f"field '{field}'" in text


SECOND = """\
  - fuse: false
    id: not-this-family
    when: {}
    reason: disabled
    why: again
    source: notes.md
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# one\n# two\nrules: []\n", "line 3: field 'version': Field required"),
        ("# one\n\n3", "line 3: should be an object with keys of version, rules"),
        ("&a [*a]", "line 1: should be an object with keys of version, rules"),
        (OWN + SECOND, "line 11: field 'rules[1].id': 'not-this-family' is the id at line 3 too"),
        (
            OWN.replace("not-this-family", "mixed"),
            "line 3: field 'rules[0].id': 'mixed' is taken by the default policy; rename it",
        ),
        (
            OWN.replace("families: [qwen3_next]", "- 1"),
            "line 4: field 'rules[0].when': should be an object with keys of quant_methods, quant_schemes, "
            "formats, config, families, engines, roles, headers, dtypes, suffixes, specs_equal, "
            "max_shared_slots",
        ),
        (
            OWN.replace("fuse: false", "fuse: true"),
            "line 3: field 'rules[0]': "
            "a rule that fuses has reason 'ok', a rule that refuses names another code",
        ),
        (
            OWN.replace("families: [qwen3_next]", "engines: [vlm]"),
            "line 5: field 'rules[0].when.engines': 'vlm' is none of vllm, sglang",
        ),
        (
            OWN.replace("fuse: false", "fuse: false\n    fuse: true"),
            "line 7: field 'rules[0].fuse': given twice",
        ),
        ("a: b: c", "line 1: not valid YAML: mapping values are not allowed in this context"),
    ],
)
def test_what_is_said_of_a_malformed_policy(tmp_path: Path, text: str, message: str) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(text)
    with pytest.raises(FsePatchError) as caught:
        load_policy(own)
    assert str(caught.value) == f"{own}: {message}"


def test_text_that_no_parser_takes_has_no_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own.yaml"
    own.write_bytes(b"version: 1\n\0")
    with pytest.raises(FsePatchError, match=r"own\.yaml: line 1: not valid YAML: unacceptable character"):
        load_policy(own)

    def without_a_mark(text: str) -> Any:
        raise yaml.MarkedYAMLError(problem="no place")

    monkeypatch.setattr(policy_file, "LOADER", without_a_mark)
    with pytest.raises(FsePatchError) as caught:
        read_rules(own)
    assert str(caught.value) == f"{own}: line 1: not valid YAML: no place"


@pytest.mark.parametrize("text", ["", "[]", "3", "version: 1", "rules: []", "&a [*a]", "\x00", "a: b: c"])
def test_other_text_is_no_policy(tmp_path: Path, text: str) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(text)
    with pytest.raises(FsePatchError, match=r"own\.yaml: line 1: "):
        load_policy(own)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FsePatchError, match=r"gone\.yaml: the policy cannot be read"):
        load_policy(tmp_path / "gone.yaml")
    with pytest.raises(FsePatchError, match="cannot be read"):
        load_policy(tmp_path)
    (tmp_path / "own.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(FsePatchError, match="not UTF-8"):
        load_policy(tmp_path / "own.yaml")


def test_rule_ids_are_unique(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(OWN + OWN.split("rules:\n")[1])
    with pytest.raises(FsePatchError, match=r"line 10: field 'rules\[1\]\.id': .* line 3 too"):
        load_policy(own)
    own.write_text(OWN.replace("not-this-family", "mixed"))
    with pytest.raises(FsePatchError, match=r"line 3: field 'rules\[0\]\.id': 'mixed' is taken"):
        load_policy(own)


def test_the_default_policy_is_the_shipped_file() -> None:
    assert load_policy().rules == read_rules(DEFAULT_POLICY)
