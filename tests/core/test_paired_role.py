"""A paired role from its load to its record: proof, updates, and what switches it off."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from fse_patch import runtime, settings  # noqa: E402
from fse_patch.adapters import pair_threshold  # noqa: E402
from fse_patch.adapters.expert_reading import Unreadable  # noqa: E402
from fse_patch.adapters.pair_proof import start_roles  # noqa: E402
from fse_patch.adapters.paired import PairedRole  # noqa: E402
from fse_patch.errors import FsePatchError  # noqa: E402
from fse_patch.fusion_core.forward.paired import PairedWeights  # noqa: E402
from fse_patch.fusion_core.reasons import Reason  # noqa: E402

from .paired_roles import Engine, Layer, load, role_of, thresholds  # noqa: E402
from .test_paired_layer import drawn  # noqa: E402


def test_nothing_runs_before_it_is_proved_then_up_to_the_threshold(caplog: Any) -> None:
    role = role_of()
    load(role)
    assert [layer.copies for layer in role.layers.values()] == [1, 1]
    assert thresholds(role) == {0}
    with caplog.at_level(logging.INFO, "fse_patch"):
        start_roles([role], Engine())
    assert thresholds(role) == {4}
    told = role.report()
    assert (told["weight_layout"], told["fused_layers"]) == ("paired", [])
    assert told["paired"]["proof"]["state"] == "passed"
    assert told["paired"]["proof"]["layers"] == [0, 1]
    assert told["paired"]["threshold_from"] == settings.CPU_THRESHOLD
    (line,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.INFO]
    assert "shared expert paired up to 4 tokens" in line
    # Once a role.
    engine = Engine()
    start_roles([role], engine)
    assert engine.gathered == 0


def faulty(fault: str) -> PairedRole:
    role = role_of()
    first: Any = role.layers[0]
    other = drawn(9, dtype=torch.float32)
    if fault == "wrong shared pointer":
        first.held = replace(first.held, shared=other.shared)
    elif fault == "gate of another layer":
        first.held = replace(first.held, gate=other.gate)
    elif fault == "shared gate of another layer":
        first.held = replace(first.held, shared_gate=other.shared_gate)
    elif fault == "pair counted twice":
        first.held = replace(first.held, expert_map=torch.arange(8, dtype=torch.int32) % 4)
    return role


@pytest.mark.parametrize(
    "fault",
    ["wrong shared pointer", "gate of another layer", "shared gate of another layer", "pair counted twice"],
)
def test_a_fault_switches_the_pass_off_and_stock_serves(fault: str, caplog: Any) -> None:
    role = faulty(fault)
    load(role)
    start_roles([role], Engine())
    assert thresholds(role) == {0}
    assert role.loaded is not None
    assert (role.loaded.proof.state, role.loaded.reason.code) == ("failed", "proof.failed")  # type: ignore[union-attr]
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "not paired: proof.failed: layer 0" in warning
    assert any(d["reason"] == "proof.failed" for d in runtime.decisions())


def test_a_layout_that_cannot_be_read_switches_it_off() -> None:
    role = role_of()

    def unreadable() -> PairedWeights:
        raise Unreadable("packed")

    role.layers[1].layer.read = unreadable
    role.layers[1].read = unreadable  # type: ignore[method-assign]
    start_roles([role], Engine())
    assert thresholds(role) == {0}
    assert role.loaded.reason == Reason("backend.layout", "packed")  # type: ignore[union-attr]


def test_a_role_without_layers_says_so(caplog: Any) -> None:
    role = role_of()
    role.layers.clear()
    start_roles([role], Engine())
    assert role.loaded.reason.code == "backend.layout"  # type: ignore[union-attr]
    assert "no layer was built" in caplog.text


def test_an_update_after_which_nothing_can_be_read_switches_it_off() -> None:
    role = role_of()
    load(role)
    start_roles([role], Engine())

    def unreadable() -> PairedWeights:
        raise Unreadable("packed")

    role.layers[1].read = unreadable  # type: ignore[method-assign]
    load(role)
    assert thresholds(role) == {0}
    assert role.loaded.reason == Reason("backend.layout", "after an update: packed")  # type: ignore[union-attr]


def test_one_process_that_fails_switches_all_off() -> None:
    from fse_patch.adapters.loaded_pairs import PairProof

    role = role_of()
    start_roles([role], Engine(PairProof("failed", detail="somewhere else")))
    assert thresholds(role) == {0}
    assert role.loaded.reason.detail == "in another process: somewhere else"  # type: ignore[union-attr]


def test_the_smallest_threshold_of_all_processes_holds() -> None:
    role = role_of()
    start_roles([role], Engine(pair_threshold.Chosen(2, "measured")))
    assert thresholds(role) == {2}


def test_strict_stops_where_a_proof_fails() -> None:
    role = faulty("wrong shared pointer")
    role.start = replace(role.start, settings=replace(role.start.settings, strict=True))
    with pytest.raises(SystemExit) as stopped:
        start_roles([role], Engine())
    assert stopped.value.code == 3


def test_an_update_is_looked_at_and_proved_anew() -> None:
    role = role_of()
    load(role)
    start_roles([role], Engine())
    before = role.loaded
    for layer in role.layers.values():
        layer.held = layer.engine_held = drawn(20, dtype=torch.float32)  # type: ignore[attr-defined]
    load(role)
    assert thresholds(role) == {4}
    assert role.loaded is not None
    assert role.loaded.loads == 2
    assert role.loaded.layers[0].addresses != before.layers[0].addresses  # type: ignore[union-attr]


def test_a_stale_address_after_an_update_is_caught(caplog: Any) -> None:
    role = role_of()
    load(role)
    start_roles([role], Engine())
    for layer in role.layers.values():
        layer.engine_held = drawn(20, dtype=torch.float32)  # type: ignore[attr-defined]
    load(role)
    assert thresholds(role) == {0}
    assert role.loaded.reason.code == "proof.failed"  # type: ignore[union-attr]
    assert "after an update" in caplog.text


@pytest.mark.parametrize("renewed", [True, False])
def test_what_the_engine_keeps_of_a_gate_is_renewed_by_an_update(
    renewed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As GLM's gate in SGLang does, which keeps a copy in float32."""
    role = role_of()
    for layer in role.layers.values():
        kept = replace(layer.held, gate=layer.held.gate.clone())  # type: ignore[attr-defined]
        layer.engine_held = kept  # type: ignore[attr-defined]
    if renewed:
        monkeypatch.setattr(Layer, "refresh", lambda self: self.engine_held.gate.copy_(self.held.gate))
    load(role)
    start_roles([role], Engine())
    for layer in role.layers.values():
        layer.held.gate.neg_()  # type: ignore[attr-defined]
    load(role)
    assert thresholds(role) == ({4} if renewed else {0})


def test_graphs_that_hold_an_address_refuse_an_update_that_moves_it() -> None:
    role = role_of()
    load(role)
    start_roles([role], Engine())
    for layer in role.layers.values():
        layer.layer.captured = layer.read().addresses
    load(role)  # the same addresses: fine
    for layer in role.layers.values():
        layer.held = layer.engine_held = drawn(20, dtype=torch.float32)  # type: ignore[attr-defined]
    with pytest.raises(FsePatchError, match="captured CUDA graphs read the old ones"):
        load(role)


def test_a_layer_that_cannot_be_taken_in_leaves_all_to_the_engine(caplog: Any) -> None:
    why = "layer 2 is not built in the way that is known: AttributeError: no such part"

    def wrap() -> Any:
        raise AttributeError("no such part")

    role = role_of()
    role.take(2, wrap)
    load(role)
    start_roles([role], Engine())
    assert thresholds(role) == {0}
    assert role.loaded is not None
    assert role.loaded.reason == Reason("backend.layout", why)
    assert why in caplog.text
