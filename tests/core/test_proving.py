"""What becomes of a model that the canary cannot compare: quantised ones stop, plain ones say so."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fse_patch.adapters import prove
from fse_patch.adapters.start import proof
from fse_patch.errors import AuditError
from fse_patch.fusion_core.checkpoint.families import family_of
from fse_patch.fusion_core.checkpoint.naming import TensorNaming
from fse_patch.fusion_core.decision import proven
from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.decision.outcome import FusionDecision
from fse_patch.fusion_core.forward.plan import ModeCounter
from fse_patch.fusion_core.proof.canary import CanaryError

from .fp8 import MLP, SCHEMES, Kernel, Tensors, layer, opened, stored
from .test_canary import made as made_plain
from .test_proven import made

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


def fusion(folder: Path, decision: FusionDecision, tensors: Tensors, kernel: Any = None) -> Any:
    """A model that was loaded: as much of `ModelFusion` as proving looks at."""
    family = family_of(decision.model_type)
    assert family is not None

    def part(name: str) -> Any:
        return SimpleNamespace(weight=tensors[f"{MLP}{name}.weight"])

    block = SimpleNamespace(gate=part("gate"), shared_expert_gate=part("shared_expert_gate"), kernel=kernel)
    return SimpleNamespace(
        decision=decision,
        naming=TensorNaming(family, 2),
        checkpoint=folder,
        canary={"state": "pending", "layers": [], "deviation": 0.0, "tolerance": 1.0},
        audit=SimpleNamespace(loads=1),
        blocks={1: block},
        experts={1: torch.nn.Linear(1, 1)},
        executions={},
        counter=ModeCounter(),
        open=lambda: None,
        proved=lambda: None,
        check_gates=lambda: None,
    )


@pytest.fixture(autouse=True)
def default_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FSE_PATCH_VERIFY", "FSE_PATCH_ALLOW_UNPROVEN"):
        monkeypatch.delenv(name, raising=False)


def quantised(folder: Path, scheme: str = "block") -> Any:
    decision = layer(scheme, LAYOUT)
    tensors = stored(decision, SCHEMES[scheme], 1)
    opened(folder, decision, scheme, tensors)
    return fusion(folder, decision, tensors, Kernel(decision, scheme, tensors))


@pytest.mark.parametrize("scheme", ["block", "tensor, static", "channel"])
def test_a_quantised_layer_is_proved(tmp_path: Path, scheme: str) -> None:
    model = quantised(tmp_path, scheme)
    prove.prove(model, torch.bfloat16, Prover())
    assert model.canary["state"] == "passed"
    assert 0 < model.canary["deviation"] < model.canary["tolerance"] < 0.4


def test_a_quantised_layer_that_is_wrong_stops_the_load(tmp_path: Path) -> None:
    model = quantised(tmp_path)
    model.blocks[1].kernel.slot_factor = 1.25
    with pytest.raises(AuditError, match=r"canary: layer 1 .* the model is not served"):
        prove.prove(model, torch.bfloat16, Prover())


def test_a_quantised_layer_without_reference_is_not_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = quantised(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CanaryError, match=r"cannot be proved: .*FSE_PATCH_ALLOW_UNPROVEN=1 serves it"):
        prove.prove(model, torch.bfloat16, Prover())
    model.canary["state"] = "pending"
    monkeypatch.setenv("FSE_PATCH_ALLOW_UNPROVEN", "1")
    prove.prove(model, torch.bfloat16, Prover())
    assert model.canary["state"] == "no_reference"
    assert "has no safetensors files" in caplog.text


def test_a_plain_checkpoint_without_reference_is_served_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights in other files than safetensors, of a checkpoint that declares no quantisation."""
    decision, tensors = made_plain("softmax")
    model = fusion(tmp_path, decision, tensors)
    model.decision = FusionDecision(**{**vars(decision), "quant_method": "none"})
    prove.prove(model, torch.float32, Prover())
    assert model.canary["state"] == "no_reference"
    assert "has no safetensors files" in caplog.text


def test_what_came_from_no_checkpoint_says_so(tmp_path: Path) -> None:
    """As with load_format=dummy: quantised or not, nothing was loaded that could be compared."""
    model = quantised(tmp_path)
    model.audit.loads, model.poisoned = 0, []
    prove.prove(model, torch.bfloat16, Prover())
    assert model.canary["state"] == "not_loaded"
    model.poisoned, model.canary["state"] = [1], "pending"
    with pytest.raises(AuditError, match="were never loaded"):
        prove.prove(model, torch.bfloat16, Prover())


def test_a_format_that_the_canary_cannot_read_is_refused_before_it_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Even one that was run and compared: a load of another checkpoint can go wrong all the same."""
    ran = {"int4-gptq": {"vllm": ("cpu",)}, "fp8-block": {"vllm": ("cpu",)}}
    monkeypatch.setattr(proven, "read_proven", lambda *_: ran)
    assert list(proof(made("fp8", ("fp8-block",)), "cpu")) == []
    assert [reason for reason, _ in proof(made("fp8", ("fp8-block",)), "cuda")] == ["quant.unproven"]
    four_bit = made("gptq", ("int4-gptq",))
    ((reason, detail),) = proof(four_bit, "cpu")
    assert (reason, "does not read int4-gptq" in detail) == ("quant.unproven", True)
    monkeypatch.setenv("FSE_PATCH_VERIFY", "off")
    assert list(proof(four_bit, "cpu")) == []
    monkeypatch.setenv("FSE_PATCH_VERIFY", "all")
    monkeypatch.setenv("FSE_PATCH_ALLOW_UNPROVEN", "1")
    assert list(proof(four_bit, "cpu")) == []
