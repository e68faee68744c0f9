"""Around the modes: each is proved before serving, tables of the engine's kernel, doctor on ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fse_patch import doctor, settings
from fse_patch.adapters import prove, tuned_configs
from fse_patch.adapters.role import FusedRole
from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.forward.layer import FusedLayer
from fse_patch.fusion_core.forward.plan import ModeCounter, ModePlan
from fse_patch.fusion_core.forward.router import SlotAppender
from fse_patch.fusion_core.proof.canary import CanaryError, Reference
from fse_patch.fusion_core.reasons import Reason

from .moe import Slots, decision, start_of
from .test_mode_plans import table

HIDDEN = torch.ones(2, 2)
WANTED = Reference(HIDDEN, 2 * HIDDEN.double(), HIDDEN.double(), 0.01, None)
LAYOUT = ExpertLayout(512, 1, 10, 2048, 512)


class Execution:
    """Stands for an `Execution`: notes the mode that each call ran in."""

    def __init__(self, plan: ModePlan) -> None:
        self.plan, self.forced, self.ran, self.wrong = plan, None, [], ""

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        self.ran.append(self.forced)
        return hidden * (1.5 if self.forced == self.wrong else 2.0)


class Prover(prove.Prover):
    def forward(self, block: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = block(hidden_states)
        return states

    def parts(self, block: Any) -> int:
        return 1

    def all_reduce(self, states: torch.Tensor) -> torch.Tensor:
        return states


@pytest.mark.parametrize("wrong", ["", "small", "fused", "split"])
def test_the_canary_runs_every_mode(wrong: str) -> None:
    execution = Execution(ModePlan(((4, "small"), (16, "fused")), "split", "test"))
    execution.wrong = wrong
    block: Any = torch.nn.Module()
    block.forward = execution
    block.gate = torch.nn.Linear(2, 2)
    made = decision(LAYOUT, shared_weight="constant")
    fused_role = FusedRole(start_of(made), Slots())
    router = SlotAppender(0, made.moe, ModeCounter())
    layer = FusedLayer(0, router, block.gate, block, execution)  # type: ignore[arg-type]
    if wrong:
        with pytest.raises(CanaryError, match="not served"):
            prove._prove_layer(fused_role, layer, Prover(), WANTED)
        assert execution.ran[-1] == wrong
    else:
        prove._prove_layer(fused_role, layer, Prover(), WANTED)
        assert execution.ran == ["fused", "small", "split"]
    assert execution.forced is None


def test_the_kernels_table_of_e_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {512: {1: "tuned for 512"}, 257: {1: "tuned for 257"}}
    asked: list[Any] = []

    def original(
        E: int, N: int, dtype: str | None, block_n: int | None = None, block_k: int | None = None
    ) -> Any:
        asked.append((E, N, dtype, block_n, block_k))
        return tables.get(E)

    layouts = [LAYOUT, ExpertLayout(256, 1, 8, 2048, 512), ExpertLayout(60, 4, 4, 2048, 1408)]
    roles = [FusedRole(start_of(decision(layout)), Slots()) for layout in layouts]
    monkeypatch.setattr(tuned_configs, "CONSTRUCTED", roles)
    monkeypatch.setattr(tuned_configs, "LOOKED_UP", {})
    patched = tuned_configs.get_moe_configs(original)
    assert patched(513, 512, None, 0, 0) == {1: "tuned for 512"}
    assert asked == [(513, 512, None, 0, 0), (512, 512, None, 0, 0)]
    # Its own table wins; without one for E there is none; another model's numbers are not guessed at.
    assert patched(257, 512, None) == {1: "tuned for 257"}
    assert patched(64, 512, None) is None
    assert patched(514, 512, None) is None
    # What was found is noted.
    tuned = {513: "E=512,N=512", 257: "E=257,N=512", 64: "none", 514: "none"}
    assert tuned == tuned_configs.LOOKED_UP


def test_a_layer_that_its_engine_fuses_by_itself_keeps_its_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    merged = decision(LAYOUT)
    native = merged.refused(Reason("upstream.already", ""))
    monkeypatch.setattr(tuned_configs, "LOOKED_UP", {})
    patched = tuned_configs.get_moe_configs(lambda E, *_: "tuned for 512" if E == 512 else None)
    for decided, taken in ((native, None), (merged, "tuned for 512")):
        role = FusedRole(start_of(decided), Slots())
        monkeypatch.setattr(tuned_configs, "CONSTRUCTED", [role])
        assert patched(513, 512, None) == taken


def test_doctor_names_the_tables(tmp_path: Path) -> None:
    problems: list[str] = []
    own = settings.load({settings.TUNED: str(table(tmp_path / "own.yaml"))})
    found = doctor._modes(own, ["Some GPU"], problems)
    assert [entry["here"] for entry in found] == [True] + [False] * (len(found) - 1)
    assert found[0]["shapes"] == ["E=512+1 k=10 H=2048 I=512 bfloat16"]
    assert not problems
    doctor._modes(settings.load({settings.TUNED: str(tmp_path / "none.yaml")}), [], problems)
    assert "none.yaml" in problems[0]
