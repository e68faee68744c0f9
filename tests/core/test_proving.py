"""What becomes of a model that the canary cannot compare: quantised ones stop, plain ones say so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from fse_patch import settings
from fse_patch.adapters import prove
from fse_patch.adapters.refusals import without_proof
from fse_patch.adapters.role import FusedRole
from fse_patch.errors import AuditError
from fse_patch.fusion_core.decision import proven
from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.decision.outcome import Merged
from fse_patch.fusion_core.forward.layer import FusedLayer
from fse_patch.fusion_core.forward.router import SlotAppender
from fse_patch.fusion_core.proof.canary import CanaryError
from fse_patch.fusion_core.reasons import Reason
from fse_patch.fusion_core.weights.audit import poison

from .fp8 import MLP, SCHEMES, Kernel, Tensors, layer, opened, stored
from .moe import Slots, start_of, stored_as
from .test_canary import made as made_plain

LAYOUT = ExpertLayout(6, 2, 3, 96, 32)


class Prover(prove.Prover):
    """Runs a kernel of the tests as the block."""

    def forward(self, block: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = block.kernel.forward(hidden_states)
        return states

    def parts(self, block: Any) -> int:
        return 1

    def all_reduce(self, states: torch.Tensor) -> torch.Tensor:
        raise AssertionError


def loaded(folder: Path, decision: Merged, tensors: Tensors, kernel: Any = None) -> FusedRole:
    """A role with one layer that was built and loaded; its block runs ``kernel``."""
    role = FusedRole(start_of(decision, folder, settings=settings.load()), Slots())
    block: Any = torch.nn.Module()
    for name in ("gate", "shared_expert_gate"):
        gate = torch.nn.Module()
        gate.weight = torch.nn.Parameter(tensors[f"{MLP}{name}.weight"], requires_grad=False)
        setattr(block, name, gate)
    block.kernel = kernel
    layout = decision.moe.layout
    experts = torch.nn.Module()
    w13 = torch.zeros(layout.num_experts, 2 * layout.moe_intermediate_size, layout.hidden_size)
    w2 = torch.zeros(layout.num_experts, layout.hidden_size, layout.moe_intermediate_size)
    for name, tensor in (("w13_weight", w13), ("w2_weight", w2)):
        experts.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    router = SlotAppender(1, decision.moe, role.counter, lambda states: states[:, :1])
    role.add_layer(FusedLayer(1, router, experts, block))
    fill(role)
    role.audit.loads = 1
    return role


def fill(role: FusedRole) -> None:
    """Write something everywhere, as a load does, and as load_format=dummy does without one."""
    for parameter in role.layers[1].experts.parameters():
        parameter.data.zero_()


def state(role: FusedRole) -> str:
    assert role.loaded is not None
    return role.loaded.proof.state


@pytest.fixture(autouse=True)
def default_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FSE_PATCH_VERIFY", "FSE_PATCH_ALLOW_UNPROVEN"):
        monkeypatch.delenv(name, raising=False)


def quantised(folder: Path, scheme: str = "block") -> FusedRole:
    decision = layer(scheme, LAYOUT)
    tensors = stored(decision, SCHEMES[scheme], 1)
    opened(folder, decision, scheme, tensors)
    return loaded(folder, decision, tensors, Kernel(decision, scheme, tensors))


@pytest.mark.parametrize("scheme", ["block", "tensor, static", "channel"])
def test_a_quantised_layer_is_proved(tmp_path: Path, scheme: str) -> None:
    role = quantised(tmp_path, scheme)
    prove.prove(role, torch.bfloat16, Prover())
    assert role.loaded is not None
    proof = role.loaded.proof
    assert proof.state == "passed"
    assert 0 < proof.deviation < proof.tolerance < 0.4


def test_a_quantised_layer_that_is_wrong_stops_the_load(tmp_path: Path) -> None:
    role = quantised(tmp_path)
    block: Any = role.layers[1].block
    block.kernel.slot_factor = 1.25
    with pytest.raises(AuditError, match=r"canary: layer 1 .* the model is not served"):
        prove.prove(role, torch.bfloat16, Prover())
    assert role.loaded is None


def test_a_quantised_layer_without_reference_is_not_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    role = quantised(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CanaryError, match=r"cannot be proved: .*FSE_PATCH_ALLOW_UNPROVEN=1 serves it"):
        prove.prove(role, torch.bfloat16, Prover())
    monkeypatch.setenv("FSE_PATCH_ALLOW_UNPROVEN", "1")
    role = quantised(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    prove.prove(role, torch.bfloat16, Prover())
    assert state(role) == "no_reference"
    assert "has no safetensors files" in caplog.text


def test_a_plain_checkpoint_without_reference_is_served_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights in other files than safetensors, of a checkpoint that declares no quantisation."""
    decision, tensors = made_plain("softmax")
    role = loaded(tmp_path, replace(decision, quant_method="none"), tensors)
    prove.prove(role, torch.float32, Prover())
    assert state(role) == "no_reference"
    assert "has no safetensors files" in caplog.text


class Two(Prover):
    """One of two processes that share the block; the other has files to compare with, or none."""

    def __init__(self, other_has_files: bool) -> None:
        self.other_has_files = other_has_files
        self.sums: list[float] = []

    def parts(self, block: Any) -> int:
        return 2

    def all_reduce(self, states: torch.Tensor) -> torch.Tensor:
        self.sums.append(float(states.abs().max()))
        if len(self.sums) == 1:
            return states + float(self.other_has_files)
        return states * 2  # the block has summed already


@pytest.mark.parametrize("gone", ["nowhere", "here", "there"])
def test_no_process_waits_for_one_that_has_no_files(
    gone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FSE_PATCH_ALLOW_UNPROVEN", "1")
    role = quantised(tmp_path)
    if gone == "here":
        (tmp_path / "model.safetensors").unlink()
    prover = Two(other_has_files=gone != "there")
    prove.prove(role, torch.bfloat16, prover)
    if gone == "nowhere":
        assert state(role) == "passed"
        assert len(prover.sums) == 2
        return
    assert state(role) == "no_reference"
    # It said so to the other one, and ran no block.
    assert prover.sums == [0.0 if gone == "here" else 1.0]
    assert ("another process" in caplog.text) == (gone == "there")


def test_what_came_from_no_checkpoint_says_so(tmp_path: Path) -> None:
    """As with load_format=dummy: quantised or not, nothing was loaded that could be compared."""
    role = quantised(tmp_path)
    role.audit.loads = 0
    prove.prove(role, torch.bfloat16, Prover())
    assert state(role) == "not_loaded"
    role = quantised(tmp_path)
    role.audit.loads = 0
    poison(cast(torch.Tensor, role.layers[1].experts.w2_weight).data[LAYOUT.num_routed :])
    with pytest.raises(AuditError, match="were never loaded"):
        prove.prove(role, torch.bfloat16, Prover())


def refused(method: str, form: str, platform: str) -> list[Reason]:
    """What speaks against fusing experts of one format, by the settings of now."""
    return list(without_proof(stored_as(method, (form,)), platform, settings.load()))


def test_a_format_that_the_canary_cannot_read_is_refused_before_it_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Even one that was run and compared: a load of another checkpoint can go wrong all the same."""
    ran = {name: {"vllm": ("cpu",)} for name in ("int8-awq", "int4-awq", "fp8-block")}
    monkeypatch.setattr(proven, "read_proven", lambda *_: ran)
    assert refused("fp8", "fp8-block", "cpu") == []
    assert refused("awq", "int4-awq", "cpu") == []
    assert [r.code for r in refused("fp8", "fp8-block", "cuda")] == ["quant.unproven"]
    (reason,) = refused("awq", "int8-awq", "cpu")
    assert (reason.code, "does not read int8-awq" in reason.detail) == ("quant.unproven", True)
    monkeypatch.setenv("FSE_PATCH_VERIFY", "off")
    assert refused("awq", "int8-awq", "cpu") == []
    monkeypatch.setenv("FSE_PATCH_VERIFY", "all")
    monkeypatch.setenv("FSE_PATCH_ALLOW_UNPROVEN", "1")
    assert refused("awq", "int8-awq", "cpu") == []
