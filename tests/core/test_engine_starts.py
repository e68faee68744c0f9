"""What each engine's start asks, and in which order: a refusal ends it, and nothing behind it is asked."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fse_patch.adapters import start
from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.checkpoint.sources import FolderSource
from fse_patch.fusion_core.checkpoint.weight_files import CheckpointFiles
from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.forward.plan import always
from fse_patch.fusion_core.reasons import Reason

from .moe import decision

NO_FILES = CheckpointFiles(FolderSource(Path()), (), "")
MADE = decision(ExpertLayout(8, 1, 2, 16, 4), layers=(0, 1))
LORA, EXPERTS = Reason("lora", "LoRA is on"), Reason("parallel.ep", "expert parallelism is on")
UPSTREAM = Reason("upstream.already", "it fuses by itself")


class Asked:
    """The engine's side of `start_of`, which says what was asked of it."""

    def __init__(self, engine: str, monkeypatch: pytest.MonkeyPatch, reasons: list[Reason]) -> None:
        self.names: list[str] = []
        self.start = importlib.import_module(f"fse_patch.adapters.{engine}.start")
        native = self.start.native
        replaced = {
            "role_of": lambda *_: "main",
            "decision_of": self.answer("decision", start.Settled(MADE, NO_FILES)),
            # Both ask the engine, which is not here.
            "_downloaded": lambda *_: "",
            "_groups": lambda _: None,
            "load_format_given": lambda _: "auto",
            "expert_ranks": lambda *_: 1,
            "refusals": lambda *_: self.refusals(reasons),
            "format_here": self.answer("format", None),
            "plan_of": self.answer("plan", always("fused", "test")),
            "native_plan": self.answer("native plan", always("fused", "test")),
        }
        for name, value in replaced.items():
            if hasattr(self.start, name):
                monkeypatch.setattr(self.start, name, value)
        said = lambda decided, _: self.names.append("on" if decided.to_dict()["fuse"] else "off")  # noqa: E731
        monkeypatch.setattr(start, "announce", said)
        monkeypatch.setattr(native, "live", lambda *_: None)
        if engine == "sglang":
            monkeypatch.setattr(native, "platform", lambda: "cpu")

    def answer(self, name: str, value: object) -> Any:
        """What answers ``value``, and says that it was asked."""

        def answer(*_: object) -> object:
            self.names.append(name)
            return value

        return answer

    def refusals(self, reasons: list[Reason]) -> Iterator[Reason]:
        """The reasons, one at a time."""
        for reason in reasons:
            self.names.append(reason.code)
            yield reason

    def __call__(self, folder: Path) -> Any:
        """Start a role of the model in ``folder``."""
        text = SimpleNamespace(model_type="qwen2_moe", num_hidden_layers=2)
        source = SimpleNamespace(
            model=str(folder), model_path=str(folder), revision=None, hf_text_config=text
        )
        load = SimpleNamespace(download_dir=None, load_format="auto")
        if self.start.ENGINE == "sglang":
            return self.start.start_of(object, source, load, None)
        config = SimpleNamespace(model_config=source, load_config=load, speculative_config=None)
        return self.start.start_of(object, config)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_refusal_ends_what_is_asked(engine: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = Asked(engine, monkeypatch, [LORA, EXPERTS])
    assert isinstance(asked(tmp_path), start.Unfused)
    assert asked.names == ["decision", "lora", "off"]
    # The control: without one, all of it is asked, once.
    asked = Asked(engine, monkeypatch, [])
    assert isinstance(asked(tmp_path), start.Start)
    assert [name for name in asked.names if name != "format"] == ["decision", "plan", "on"]
    assert asked.names.count("format") == (engine == "vllm")


def test_modes_beside_native_fusion_where_nothing_else_refuses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = Asked("sglang", monkeypatch, [UPSTREAM])
    role = asked(tmp_path)
    assert (isinstance(role, start.Start), role.merged) == (True, False)
    assert asked.names == ["decision", UPSTREAM.code, "native plan", "off"]
    # The controls: another reason beside it, or before it.
    for reasons in ([UPSTREAM, LORA], [LORA, UPSTREAM]):
        asked = Asked("sglang", monkeypatch, reasons)
        assert isinstance(asked(tmp_path), start.Unfused)
        assert "native plan" not in asked.names


def test_what_fuses_is_of_a_family() -> None:
    assert MADE.family.name == "qwen2_moe"
    with pytest.raises(FsePatchError, match="'other' fuses, and is of no family"):
        _ = decision(MADE.moe.layout, model_type="other").family
