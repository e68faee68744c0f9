"""Where an engine's own configuration speaks against fusing, and how a decision is told."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from fse_patch import runtime
from fse_patch.adapters import start
from fse_patch.adapters.patching import ledger, standing
from fse_patch.adapters.refusals import measured, unmeasured
from fse_patch.errors import FsePatchError, RefusedError
from fse_patch.fusion_core.checkpoint.sources import FolderSource, Source
from fse_patch.fusion_core.checkpoint.weight_files import CheckpointFiles
from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.decision.outcome import RoutingSpec
from fse_patch.fusion_core.forward.plan import ModePlan, always
from fse_patch.fusion_core.reasons import CONTRADICTIONS, Reason
from fse_patch.settings import Settings

from .moe import decision, start_of
from .outcomes import stock
from .test_mode_plans import HERE, table

LAYOUT = ExpertLayout(num_routed=8, num_shared_slots=1, top_k=2, hidden_size=16, moe_intermediate_size=4)
MADE = decision(LAYOUT, RoutingSpec("softmax", True), layers=(0, 1))
FILES = CheckpointFiles(FolderSource(Path()), (), "")
LORA = Reason("lora", "LoRA is enabled; run without --enable-lora")


def test_a_start_is_merged_where_its_decision_is() -> None:
    assert start_of(MADE).merged
    native = start_of(MADE.refused(Reason("upstream.already", "")))
    assert not native.merged
    assert native.moe == MADE.moe


def test_arguments_that_contradict_stop_the_process_where_strictness_was_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    strict = Settings(strict=True)
    with pytest.raises(SystemExit) as caught:
        start.begin(start.Settled(MADE.refused(LORA)), 2, strict)
    assert caught.value.code == 3
    assert capsys.readouterr().err == f"fse_patch: vllm: lora: {LORA.detail}\n"
    # The controls: without it, and for what nobody asked for by an argument.
    slow = Reason("slower.unmeasured", "no table")
    assert LORA.code in CONTRADICTIONS
    assert slow.code not in CONTRADICTIONS
    for reason, effective in ((LORA, Settings()), (slow, strict)):
        assert start.begin(start.Settled(MADE.refused(reason)), 2, effective) == start.Unfused()
    assert capsys.readouterr().err == ""


def test_a_checkpoint_that_cannot_be_read_is_refused() -> None:
    def locate() -> Source:
        raise FsePatchError("no such folder")

    decided = start.decision_of("vllm", "draft", locate, "auto", Settings()).decision
    assert stock(decided).reason == Reason("evidence.unreadable", "no such folder")
    assert (decided.role, decided.engine, decided.moe) == ("draft", "vllm", None)


def test_a_fault_of_ours_before_anything_is_built_leaves_a_server_that_starts() -> None:
    def locate() -> Source:
        raise KeyError("planted\nfault")

    decided = start.decision_of("vllm", "main", locate, "auto", Settings()).decision
    assert stock(decided).reason.code == "evidence.unreadable"
    assert "KeyError" in stock(decided).reason.detail
    assert "\n" not in stock(decided).reason.detail


class Group:
    """An engine's group as one of its processes sees it: what the first one says is what all get."""

    def __init__(self, rank: int, said: list[Any]) -> None:
        self.rank_in_group, self.said = rank, said

    def broadcast_object(self, value: Any, src: int) -> Any:
        assert src == 0
        if self.rank_in_group == 0:
            self.said.append(value)
        return self.said[-1]


def test_the_first_process_settles_for_all_stages() -> None:
    tensor: dict[int, list[Any]] = {0: [], 1: []}
    pipeline: list[Any] = []
    calls: list[tuple[int, int]] = []
    outcomes = []
    # Two stages of two processes; the first of the first stage alone is asked.
    for stage, rank in ((0, 0), (1, 0), (0, 1), (1, 1)):

        def settle(place: tuple[int, int] = (stage, rank)) -> start.Settled:
            calls.append(place)
            return start.Settled(MADE)

        groups = Group(rank, tensor[stage]), Group(stage, pipeline)
        outcomes.append(start.first_of_replica(settle, *groups))
    assert calls == [(0, 0)]
    assert all(outcome is outcomes[0] for outcome in outcomes)
    # A draft is in one stage alone, and its first process is asked.
    assert start.first_of_replica(lambda: start.Settled(MADE), Group(0, []), None).decision == MADE


def test_what_the_first_process_cannot_settle_ends_all_of_them() -> None:
    said: list[Any] = []

    def settle() -> start.Settled:
        raise FsePatchError("a policy that is none")

    for rank in (0, 1):
        with pytest.raises(FsePatchError, match="a policy that is none"):
            start.first_of_replica(settle, Group(rank, said), None)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many decisions there were, each time that something changed."""
    changes: list[int] = []
    monkeypatch.setattr(runtime, "_decisions", [])
    monkeypatch.setattr(runtime, "_listeners", [])
    runtime.on_change(lambda: changes.append(len(runtime.decisions())))
    return changes


def test_a_decision_is_recorded_then_told(told: list[int], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fse_patch")
    start.announce(MADE)
    start.announce(MADE.refused(LORA))
    assert told == [1, 2]
    assert [d["reason"] for d in runtime.decisions()] == ["ok", "lora"]
    assert [d["fuse"] for d in json.loads(json.dumps(runtime.decisions()))] == [True, False]
    assert [r.getMessage() for r in caplog.records] == [
        "vllm, main model: shared expert fused: ",
        f"vllm, main model: not fused: lora: {LORA.detail}",
    ]


def test_listeners_are_told_once_each(told: list[int]) -> None:
    seen: list[str] = []

    def listen() -> None:
        seen.append("again")

    runtime.changed()
    assert (told, seen) == ([0], [])
    for _ in range(2):
        runtime.on_change(listen)
    runtime.changed()
    assert (told, seen) == ([0, 0], ["again"])
    # Recording alone tells nobody: who decides says when all of it is there.
    runtime.record_decision({"engine": "vllm"})
    assert told == [0, 0]


def test_what_was_not_measured_is_a_plan_on_request_alone(tmp_path: Path) -> None:
    plan = unmeasured(True, "on this platform")
    assert isinstance(plan, ModePlan)
    assert (plan.modes, "FSE_PATCH_ALLOW_UNMEASURED" in plan.source) == ({"fused"}, True)
    refusal = unmeasured(False, "on this platform")
    assert isinstance(refusal, Reason)
    assert (refusal.code, "on this platform" in refusal.detail) == ("slower.unmeasured", True)
    for otherwise, code in (("split", None), ("slower", "slower.measured")):
        own = Settings(tuned=str(table(tmp_path / f"{otherwise}.yaml", otherwise=otherwise)))
        answer = measured(HERE, own)
        assert (answer.code if isinstance(answer, Reason) else None) == code
    nowhere = measured(HERE, Settings())
    assert isinstance(nowhere, Reason)
    assert nowhere.code == "slower.unmeasured"
    assert isinstance(measured(HERE, Settings(allow_unmeasured=True)), ModePlan)


REFUSED = RefusedError("release.seam", "vllm 0.99: patch entry-load of it reads another text")


@pytest.fixture
def entry() -> type:
    """A class with the name of an entry class of Qwen2-MoE in vLLM."""
    return type("Qwen2MoeForCausalLM", (), {"__module__": "vllm.model_executor.models.qwen2_moe"})


def noted(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    patch = next(p for p in ledger.load("vllm").patches if p.id == "entry-load.Qwen2MoeForCausalLM")
    here = standing.Standing("vllm", "0.99", "0.32.0", patches=(patch,), **changes)
    monkeypatch.setattr(standing, "_here", {"vllm": here})


def test_a_family_whose_patches_are_not_in_is_named_and_stays_stock(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, entry: type
) -> None:
    assert start.role_of("vllm", entry) == "main"
    noted(monkeypatch, problems={"entry-load.Qwen2MoeForCausalLM": REFUSED})
    assert start.role_of("vllm", entry) is None
    start.announce_other("vllm", entry, Settings())
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", f"vllm, main model: not fused: release.seam: {REFUSED.detail}")
    ]
    # The control: the others are decided on.
    other = type("Glm4MoeForCausalLM", (), {"__module__": "vllm.model_executor.models.glm4_moe"})
    assert start.role_of("vllm", other) == "main"
    start.announce_other("vllm", other, Settings())
    assert len(caplog.records) == 1


def test_it_stops_a_server_where_strictness_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], entry: type
) -> None:
    noted(monkeypatch, problems={"entry-load.Qwen2MoeForCausalLM": REFUSED})
    with pytest.raises(SystemExit) as caught:
        start.announce_other("vllm", entry, Settings(strict=True))
    assert caught.value.code == 3
    assert capsys.readouterr().err == f"fse_patch: vllm: release.seam: {REFUSED.detail}\n"
    # The control: a model that nobody knows stops nothing.
    start.announce_other("vllm", object, Settings(strict=True))


@pytest.mark.parametrize(("version", "said"), [("0.99", True), ("0.32.0+cpu", False)])
def test_the_line_of_a_fused_model_says_that_the_release_is_new(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, version: str, said: bool
) -> None:
    monkeypatch.setattr(standing, "_here", {"vllm": standing.Standing("vllm", version, "0.32.0")})
    with caplog.at_level("INFO", "fse_patch"):
        start.begin(start.Settled(MADE, FILES, always("fused", "test")), 2, Settings())
        start.begin(start.Settled(MADE.refused(LORA)), 2, Settings())
    on, off = (record.getMessage() for record in caplog.records)
    assert on.endswith("; release 0.99 is new, its seams are those of 0.32.0") == said
    assert "is new" not in off
