"""`fse-patch policy explain` and `check` as users run them: exit status, JSON, one line for an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .checkpoints import config_of, model_tensors, with_scales, write_checkpoint
from .golden import ROWS, write_row
from .test_cli_plan import fse_patch

OWN = """\
version: 1
rules:
  - id: not-here
    when: {families: [qwen3_next]}
    fuse: false
    reason: disabled
    why: measured to be no use here
    source: notes.md
"""


def explained(folder: Path, *arguments: object) -> tuple[int, dict[str, Any]]:
    done = fse_patch("policy", "explain", folder, "--json", *arguments)
    assert done.stderr == ""
    report: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, report


def golden(folder: Path, name: str) -> Path:
    return write_row(folder, next(row for row in ROWS if row["id"] == name))


def test_a_checkpoint_that_fuses(tmp_path: Path) -> None:
    status, report = explained(golden(tmp_path, "qwen3-next-fp8-one-layer-in-bf16"))
    assert (status, report["fuse"], report["policy"]) == (0, True, "default")
    assert (report["rule"]["id"], report["rule"]["reason"]) == ("fp8", "ok")
    assert report["rule"]["source"].startswith("https://")
    first, second = report["layers"]
    assert (first["layers"], first["rule"], first["config"]) == ([0], "fp8", "agrees")
    assert (second["layers"], second["rule"], second["config"]) == ([1], "unquantised", "agrees")
    assert first["routed"] == first["shared"]
    assert "F8_E4M3" in first["shared"]["gate_up"]["headers"]
    assert first["shared"]["gate_up"]["config"] == "fp8-block, block 128x128, dynamic activations"
    assert second["shared"]["down"]["config"] == "plain"


def test_a_checkpoint_that_is_refused_and_its_draft(tmp_path: Path) -> None:
    status, report = explained(golden(tmp_path, "qwen3.6-35b-gptq-routed-only"), "--engine", "sglang")
    assert (status, report["reason"], report["rule"]["id"]) == (3, "quant.mixed", "mixed")
    (group,) = report["layers"]
    assert group["layers"] == [0, 1]
    assert group["routed"]["down"]["config"].startswith("int4-gptq, group 128")
    assert group["shared"]["down"]["config"] == "plain"
    assert report["draft"]["fuse"] is True
    assert "draft" not in report["draft"]


def test_a_refusal_before_any_rule(tmp_path: Path) -> None:
    status, report = explained(golden(tmp_path, "qwen1.5-moe-fp8-block-across-slots"))
    assert (status, report["reason"], report["rule"]) == (3, "width.block", None)
    assert report["layers"][0]["finding"].startswith("width.block: layer 0")
    status, report = explained(write_checkpoint(tmp_path / "other", {"model_type": "llama"}, None))
    assert (status, report["reason"], report["layers"]) == (3, "family.unknown", [])


def test_the_rule_of_a_user_and_the_default_denial(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(OWN)
    folder = golden(tmp_path / "c", "qwen3-next-bf16")
    assert explained(folder)[0] == 0, "control: fuses without the user's file"
    status, report = explained(folder, "--policy", own)
    assert (status, report["rule"]["number"], report["rule"]["id"]) == (3, 1, "not-here")
    assert report["policy"] == str(own)


def test_the_table_names_rule_and_evidence(tmp_path: Path) -> None:
    done = fse_patch(
        "policy", "explain", golden(tmp_path, "qwen3-next-fp8-ignored-but-stored"), COLUMNS="200"
    )
    assert done.returncode == 3
    assert done.stdout.startswith("refused: quant.")
    for words in ("contradiction", "layers 0.rule", "layers 1.config_detail", "the config says plain, but"):
        assert words in done.stdout


@pytest.mark.parametrize("arguments", [["--engine", "vlm"], ["--policy", "gone.yaml"]])
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str]) -> None:
    folder = golden(tmp_path, "qwen3-next-bf16")
    done = fse_patch("policy", "explain", folder, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fse-patch: ")
    assert done.stderr.count("\n") == 1


def test_check_accepts_a_file_and_names_its_rules(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(OWN)
    done = fse_patch("policy", "check", own, "--json")
    assert (done.returncode, json.loads(done.stdout)["rules"]) == (0, ["not-here"])
    said = fse_patch("policy", "check", own)
    assert (said.returncode, said.stdout) == (0, f"{own}: valid; rules before the default ones: not-here\n")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("fuse: false", "fuse: maybe", "line 5: field 'rules[0].fuse': "),
        ("reason: disabled", "reason: because", "line 6: field 'rules[0].reason': "),
        ("qwen3_next", "qwen9", "line 4: field 'rules[0].when.families': "),
        ("not-here", "mixed", "line 3: field 'rules[0].id': 'mixed' is taken by the default policy"),
        ("version: 1", "version: [", "not valid YAML"),
    ],
)
def test_check_names_file_line_and_field(tmp_path: Path, old: str, new: str, words: str) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(OWN.replace(old, new))
    done = fse_patch("policy", "check", own)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"fse-patch: {own}: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_plan_says_that_a_format_is_not_proven(tmp_path: Path) -> None:
    folder = write_checkpoint(
        tmp_path,
        config_of("qwen3_next", quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]}),
        with_scales(model_tensors("qwen3_next"), 16),
    )
    report = json.loads(fse_patch("plan", folder, "--engine", "vllm", "--json").stdout)
    assert (report["fuse"], report["formats"], report["proven"]) == (True, ["fp8-block"], [])
    assert "quant.unproven" in report["note"]
    plain = write_checkpoint(tmp_path / "p", config_of("qwen3_next"), model_tensors("qwen3_next"))
    report = json.loads(fse_patch("plan", plain, "--engine", "vllm", "--json").stdout)
    assert (report["formats"], report["note"]) == (["plain"], "")
