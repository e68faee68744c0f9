"""The paired layout as a part of the one decision: what may pair, what may not, and who says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fse_patch import settings
from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.decision.decide import decide
from fse_patch.fusion_core.decision.outcome import Merged, MoeSpec, Paired, Stock, paired
from fse_patch.fusion_core.decision.paired_places import Place, places, unrun
from fse_patch.fusion_core.decision.policy import Rule, When
from fse_patch.fusion_core.decision.policy_file import load_policy
from fse_patch.fusion_core.reasons import Reason

from .checkpoints import CONFIGS, I, config_of, model_tensors, write_checkpoint


def made(folder: Path, family: str = "qwen2_moe") -> Path:
    return write_checkpoint(folder / family, config_of(family), model_tensors(family))


@pytest.mark.parametrize("family", CONFIGS)
def test_what_merges_may_pair_too(tmp_path: Path, family: str) -> None:
    decision = decide(made(tmp_path, family), "vllm")
    assert isinstance(decision, Merged)
    assert decision.to_dict()["weight_layout"] == "merged"
    apart = paired(decision)
    assert isinstance(apart, Paired)
    assert apart.moe == decision.moe
    told = apart.to_dict()
    assert (told["fuse"], told["reason"], told["weight_layout"]) == (True, "ok", "paired")
    assert told["fused_layers"] == decision.moe.layers
    assert paired(apart) is apart
    off = apart.refused(Reason("proof.failed", "a test"))
    assert (off.to_dict()["fuse"], off.to_dict()["weight_layout"]) == (False, "")


def test_experts_that_differ_pair_and_do_not_merge(tmp_path: Path) -> None:
    tensors = model_tensors("qwen2_moe")
    tensors |= {n: ("F32", shape) for n, (_, shape) in tensors.items() if ".shared_expert." in n}
    decision = decide(write_checkpoint(tmp_path, config_of("qwen2_moe"), tensors), "vllm")
    assert isinstance(decision, Stock)
    assert decision.reason.code == "quant.mixed"
    assert isinstance(paired(decision), Paired)


def test_a_shared_expert_of_any_width_pairs(tmp_path: Path) -> None:
    # By config.json alone: two widths of a routed expert and one more column.
    config = config_of("qwen2_moe", shared_expert_intermediate_size=2 * I + 1)
    decision = decide(write_checkpoint(tmp_path, config, None), "vllm")
    assert isinstance(decision, Stock)
    assert decision.reason.code == "width.mismatch"
    apart = paired(decision)
    assert isinstance(apart, Paired)
    assert apart.moe.layout.num_shared_slots == 3


RULE = Rule(id="mine", when=When(), fuse=False, reason="disabled", why="a test", source="none: a test")


def test_a_rule_has_its_own_say_on_pairing(tmp_path: Path) -> None:
    folder, default = made(tmp_path), load_policy()
    for rule, merges, pairs in (
        (RULE, False, False),  # what refuses refuses both, unless it says otherwise
        (RULE.model_copy(update={"pair": True}), False, True),
        (RULE.model_copy(update={"fuse": True, "reason": "ok"}), True, True),
        (RULE.model_copy(update={"fuse": True, "reason": "ok", "pair": False}), True, False),
    ):
        policy = replace(default, rules=(rule, *default.rules))
        decision = decide(folder, "vllm", policy=policy)
        assert isinstance(decision, Merged) == merges
        apart = paired(decision)
        assert isinstance(apart, Paired) == pairs
        if not pairs:
            assert isinstance(apart, Stock)
            assert apart.reason.code == "disabled"
            assert "a test (mine)" in apart.reason.detail


def test_a_say_on_pairing_changes_the_hash_of_the_policy() -> None:
    default = load_policy()
    hashes = {
        replace(default, rules=(RULE.model_copy(update={"pair": pair}), *default.rules)).hash
        for pair in (None, True)
    }
    assert len(hashes) == 2
    # Left out it is as `fuse`: saying so changes nothing.
    same = replace(default, rules=(RULE.model_copy(update={"pair": False}), *default.rules))
    assert same.hash in hashes


@pytest.mark.parametrize("name", ["mxfp4", "quark", "quark-mxfp4", "compressed-tensors-mxfp4", "mxfp4-layer"])
def test_quark_and_mxfp4_stay_out_by_default(name: str) -> None:
    rule = next(rule for rule in load_policy().rules if rule.id == name)
    assert not rule.pairs


@pytest.mark.parametrize("name", ["mixed", "fp8", "int4", "unquantised", "quantised", "nvfp4"])
def test_formats_do_not_matter_otherwise(name: str) -> None:
    rule = next(rule for rule in load_policy().rules if rule.id == name)
    assert rule.pairs


def test_of_no_family_nothing_pairs(tmp_path: Path) -> None:
    config = config_of("qwen2_moe") | {"model_type": "qwen3_moe"}
    decision = decide(write_checkpoint(tmp_path, config, None), "vllm")
    assert not isinstance(decision.pairing, MoeSpec)
    assert isinstance(paired(decision), Stock)


def test_auto_needs_a_row_of_the_device() -> None:
    h200 = (Place(engine="vllm", platform="cuda", device="NVIDIA H200"),)
    assert unrun("vllm", "cuda", "NVIDIA H200", known=h200) is None
    for place in (
        ("sglang", "cuda", "NVIDIA H200"),
        ("vllm", "rocm", "NVIDIA H200"),
        ("vllm", "cuda", "other"),
    ):
        reason = unrun(*place, known=h200)
        assert reason is not None
        assert reason.code == "device.unrun"
    every = (h200[0].model_copy(update={"device": "*"}),)
    assert unrun("vllm", "cuda", "any", known=every) is None
    packed = unrun("vllm", "cuda", "any", True, known=every)
    assert packed is not None
    assert "packed experts" in packed.detail
    assert unrun("vllm", "cuda", "any", True, known=(every[0].model_copy(update={"packed": True}),)) is None


def test_nvidia_gpus_pair_by_themselves_and_amd_ones_do_not() -> None:
    assert places()
    for engine in ("vllm", "sglang"):
        assert unrun(engine, "cuda", "a GPU that nobody has seen") is None
        assert unrun(engine, "rocm", "AMD Instinct MI300X") is not None
        assert (unrun(engine, "cuda", "any", packed=True) is None) == (engine == "vllm")


def test_settings() -> None:
    assert settings.load({}).layout == "auto"
    assert settings.load({"FSE_PATCH_LAYOUT": "Paired"}).layout == "paired"
    with pytest.raises(FsePatchError, match=r"FSE_PATCH_LAYOUT='both': use auto, merged or paired"):
        settings.load({"FSE_PATCH_LAYOUT": "both"})
    with pytest.raises(FsePatchError, match=r"FSE_PATCH_MEASURE='1': use auto, always or off"):
        settings.load({"FSE_PATCH_MEASURE": "1"})
    assert settings.load({"FSE_PATCH_CPU_THRESHOLD": "16"}).cpu_threshold == 16
    with pytest.raises(FsePatchError, match="whole number"):
        settings.load({"FSE_PATCH_CPU_THRESHOLD": "-1"})
    assert settings.load({"FSE_PATCH_CACHE": "/there"}).cache_folder == Path("/there")
