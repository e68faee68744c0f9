"""What only memory can tell of a role is recorded once after the load, and anew after each update."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from fse_patch import runtime
from fse_patch.adapters import prove
from fse_patch.adapters.load import RoleLoader, attach, load_weights
from fse_patch.adapters.loaded import HeldTensor, Loaded, Proof
from fse_patch.adapters.role import CONSTRUCTED, FusedRole
from fse_patch.errors import AuditError, FsePatchError
from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.forward.layer import FusedLayer
from fse_patch.fusion_core.forward.router import SlotAppender
from fse_patch.fusion_core.reasons import Reason
from fse_patch.settings import Settings

from .moe import Slots, decision, start_of

E, S, H, I = 3, 2, 8, 4  # noqa: E741
LAYERS = (0, 1)
MADE = decision(ExpertLayout(E, S, 2, H, I), layers=LAYERS)
Named = tuple[str, torch.Tensor]


class NoProver(prove.Prover):
    """Runs nothing: the canary is off in these tests."""

    def forward(self, block: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    parts = all_reduce = forward  # type: ignore[assignment]


def gate(weight: torch.Tensor) -> torch.nn.Module:
    module = torch.nn.Linear(H, 1, bias=False)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return module


def built(native: bool = False) -> FusedRole:
    """A role whose layers an engine has just allocated."""
    decided = MADE.refused(Reason("upstream.already", "test")) if native else MADE
    role = FusedRole(start_of(decided, settings=Settings(verify="off")), Slots())
    for number in LAYERS:
        experts, block = torch.nn.Module(), torch.nn.Module()
        for name, shape in (("w13_weight", (E + S, 2 * I, H)), ("w2_weight", (E + S, H, I))):
            parameter = torch.nn.Parameter(torch.zeros(shape), requires_grad=False)
            experts.register_parameter(name, parameter)
        block.shared_expert_gate = gate(torch.zeros(1, H))
        router = SlotAppender(number, MADE.moe, role.counter, block.shared_expert_gate)
        role.add_layer(FusedLayer(number, router, experts, block))
    return role


def checkpoint(seed: int = 0) -> list[Named]:
    """All tensors of both layers."""
    draw = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {}
    for mlp in (f"model.layers.{number}.mlp." for number in LAYERS):
        shapes[f"{mlp}shared_expert_gate.weight"] = (1, H)
        for owner, width in [("shared_expert", S * I), *((f"experts.{e}", I) for e in range(E))]:
            shapes[f"{mlp}{owner}.gate_proj.weight"] = shapes[f"{mlp}{owner}.up_proj.weight"] = (width, H)
            shapes[f"{mlp}{owner}.down_proj.weight"] = (H, width)
    return [(name, torch.randn(shape, generator=draw)) for name, shape in shapes.items()]


class Engine:
    """What an engine's own ``load_weights`` does, with all but the shared experts."""

    def __init__(self, role: FusedRole) -> None:
        self.role = role
        self.drops_gates = False

    def __call__(self, stream: Iterable[Named]) -> str:
        for name, tensor in stream:
            ref = self.role.start.naming.parse(name)
            layer = self.role.layers[int(name.split(".")[2])]
            if ref is None:
                if not self.drops_gates:
                    block: Any = layer.block
                    block.shared_expert_gate.weight.data.copy_(tensor)
            elif ref.expert is not None:
                suffix = "w2_weight" if ref.projection == "down_proj" else "w13_weight"
                rows = getattr(layer.experts, suffix).data[ref.expert]
                place = {"gate_proj": slice(0, I), "up_proj": slice(I, None), "down_proj": slice(None)}
                rows[place[ref.projection]] = tensor
        return "loaded"


def record_of(role: FusedRole) -> Loaded:
    assert role.loaded is not None
    return role.loaded


def addresses(role: FusedRole) -> dict[int, dict[str, int]]:
    return {
        number: {name: p.data_ptr() for name, p in layer.experts.named_parameters()}
        for number, layer in role.layers.items()
    }


@pytest.fixture
def served() -> tuple[FusedRole, RoleLoader, Engine]:
    """A role that was loaded and proved, with its loader."""
    role = built()
    loader, engine = RoleLoader(role), Engine(role)
    loader.load(engine, checkpoint())
    prove.prove(role, torch.float32, NoProver())
    return role, loader, engine


def test_it_is_made_once_after_the_load() -> None:
    role = built()
    engine = Engine(role)
    assert role.loaded is None
    assert RoleLoader(role).load(engine, checkpoint()) == "loaded"
    # Not yet: nothing was proved, and the engine may still pack what it loaded.
    assert role.loaded is None
    assert role.layers[0].router.closed
    prove.prove(role, torch.float32, NoProver())
    record = record_of(role)
    assert (record.proof, record.loads, record.slots_loaded) == (Proof("off"), 1, S * len(LAYERS))
    known = {n: {name: held.address for name, held in layer.items()} for n, layer in record.experts.items()}
    assert known == addresses(role)
    assert record.experts[1]["w2_weight"].shape == (E + S, H, I)
    assert record.experts[1]["w2_weight"].dtype == "float32"
    prove.prove(role, torch.float32, NoProver())
    assert record_of(role) is record
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.loads = 2  # type: ignore[misc]


def test_it_is_made_anew_after_an_update(served: tuple[FusedRole, RoleLoader, Engine]) -> None:
    role, loader, engine = served
    before = record_of(role)
    loader.load(engine, checkpoint(seed=1))
    after = record_of(role)
    assert after is not before
    assert (before.loads, after.loads) == (1, 2)
    assert (after.proof, after.experts) == (before.proof, before.experts)
    # What was given other memory is seen by the next one.
    experts: Any = role.layers[0].experts
    experts.w2_weight = torch.nn.Parameter(experts.w2_weight.data.clone(), requires_grad=False)
    loader.load(engine, checkpoint(seed=2))
    last = record_of(role)
    assert last.experts[0]["w2_weight"] != after.experts[0]["w2_weight"]
    assert last.experts[1] == after.experts[1]


def test_an_update_that_is_wrong_leaves_it_as_it_was(served: tuple[FusedRole, RoleLoader, Engine]) -> None:
    role, loader, engine = served
    before = role.loaded
    engine.drops_gates = True
    with pytest.raises(AuditError, match="gate is not the one that was loaded"):
        loader.load(engine, checkpoint(seed=1))
    assert role.loaded is before


def test_what_an_engine_collects_is_recorded_when_it_is_done(
    served: tuple[FusedRole, RoleLoader, Engine],
) -> None:
    """As in vLLM's layer-wise reload: parameters are on no device until all has come."""
    role, _, _ = served
    before, experts = record_of(role), role.layers[0].experts
    held = experts.w2_weight
    nowhere = torch.empty(E + S, H, I, device="meta")
    experts.w2_weight = torch.nn.Parameter(nowhere, requires_grad=False)
    RoleLoader(role).load(list, [])
    assert role.audit.loads == 2
    assert record_of(role) is before
    experts.w2_weight = held
    role.updated()
    assert record_of(role) is not before
    assert record_of(role).loads == 2


def test_before_the_proof_an_update_makes_none() -> None:
    """Two loads before anything is served: a record would pass for a proof."""
    role = built()
    loader, engine = RoleLoader(role), Engine(role)
    loader.load(engine, checkpoint())
    loader.load(engine, checkpoint(seed=1))
    role.updated()
    assert role.loaded is None
    prove.prove(role, torch.float32, NoProver())
    assert record_of(role).loads == 2


def test_a_role_that_the_engine_fuses_by_itself_has_one_too() -> None:
    role = built(native=True)
    engine, loader, passed = Engine(role), RoleLoader(role), list[Named]()
    loader.load(passed.extend, [named for named in checkpoint() if "gate.weight" not in named[0]])
    # All tensors reach the engine, the shared experts' too.
    assert len(passed) == len(LAYERS) * 3 * (E + 1)
    prove.prove(role, torch.float32, NoProver())
    before = record_of(role)
    # Its layers stay as the engine has them where nothing proved them.
    assert role.layers[0].router.closed == "layer 0 was not proved"
    loader.load(engine, [named for named in checkpoint() if "shared_expert_gate" in named[0]])
    assert record_of(role) is not before
    assert (before.loads, record_of(role).loads, role.report()["native"]) == (1, 2, True)


def test_a_report_tells_of_the_proof(served: tuple[FusedRole, RoleLoader, Engine]) -> None:
    role, _, _ = served
    assert role.report()["canary"] == Proof("off").to_dict()
    assert built().report()["canary"] == Proof().to_dict()
    assert Proof().to_dict() == {"state": "pending", "layers": [], "deviation": 0.0, "tolerance": 1.0}
    told = Proof("no_reference", (1,), 0.1, 0.2, 1.23456, "why").to_dict()
    assert (told["layers"], told["seconds"], told["detail"]) == ([1], 1.235, "why")


def test_a_proof_tells_listeners(monkeypatch: pytest.MonkeyPatch) -> None:
    role, seen = built(), []
    monkeypatch.setattr(runtime, "_listeners", [])
    runtime.on_change(lambda: seen.append(role.loaded))
    RoleLoader(role).load(Engine(role), checkpoint())
    assert seen == []
    prove.prove(role, torch.float32, NoProver())
    assert seen == [role.loaded]


def test_a_loader_is_put_on_a_model() -> None:
    class Model:
        """An entry class that inherits its loader: the inner one must not start a second load."""

        engine: Engine

        @load_weights
        def load_inherited(self, weights: Iterable[Named]) -> str:
            return self.engine(weights)

        @load_weights
        def load(self, weights: Iterable[Named]) -> str:
            answer: str = self.load_inherited(weights)
            return answer

    role, model = built(), Model()
    model.engine = Engine(role)
    attach(model, role)
    assert role in CONSTRUCTED
    assert model.load(checkpoint()) == "loaded"
    assert role.audit.loads == 1
    # The control: on a model without one, the engine's own runs, and no slot is written.
    bare = Model()
    bare.engine = Engine(built())
    bare.load([named for named in checkpoint() if "shared_expert." not in named[0]])
    assert bare.engine.role.audit.loads == 0
    assert bare.engine.role.poisoned == list(LAYERS)


def test_a_tensor_that_is_nowhere_has_no_address() -> None:
    held = HeldTensor.of(torch.empty(2, 3, device="meta", dtype=torch.bfloat16))
    assert held == HeldTensor("bfloat16", (2, 3), 0)


def test_a_layer_is_built_once_and_with_room_for_its_slots() -> None:
    role = built()
    layer = role.layers[0]
    with pytest.raises(FsePatchError, match="layer 0 of the main model was built twice"):
        role.add_layer(layer)
    # Its experts too, for which no block would come any more; those of another layer may.
    with pytest.raises(FsePatchError, match="layer 0 of the main model was built twice"):
        role.begin(0)
    role.begin(2)
    assert role.unfinished == {2}
    narrow = torch.nn.Module()
    narrow.w2_weight = torch.nn.Parameter(torch.zeros(E, H, I), requires_grad=False)
    del role.layers[0]
    with pytest.raises(FsePatchError, match=f"rows for {E} experts, and {E + S} were decided"):
        role.add_layer(FusedLayer(0, layer.router, narrow, layer.block))
