"""`fse-patch doctor`: what is in force, and each thing that can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fse_patch import doctor, metrics, settings
from fse_patch.adapters.patching import guards
from fse_patch.fusion_core.engines import facts_of
from fse_patch.launch import machine

from .checkpoints import config_of, model_tensors, write_checkpoint
from .test_cli_plan import fse_patch


class Ours:
    """Our entry point, which loads."""

    name, value = "fse_patch", "fse_patch.entry_points:vllm"

    def load(self) -> None: ...


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As in an environment with a tested vLLM, whose sources are as expected."""
    for name in [*settings.DEFAULTS, "VLLM_PLUGINS"]:
        monkeypatch.delenv(name, raising=False)
    version = guards.engine_version

    def vllm_alone(book: Any, site_packages: Any = None) -> str:
        return "0.32.0" if book.engine == "vllm" else version(book, site_packages)

    monkeypatch.setattr(guards, "engine_version", vllm_alone)
    monkeypatch.setattr(guards, "guard", lambda *_: "")
    monkeypatch.setattr(doctor, "entry_points", lambda group: [Ours()])
    return monkeypatch


def problems() -> str:
    report = doctor.examine()
    assert report["ok"] == (not report["problems"])
    return "; ".join(report["problems"])


def test_all_is_well(installed: pytest.MonkeyPatch) -> None:
    report = doctor.examine()
    assert report["problems"] == report["hazards"] == []
    vllm = next(engine for engine in report["engines"] if engine["engine"] == "vllm")
    assert (vllm["installed"], vllm["is_tested"], vllm["switched_on"]) == ("0.32.0", True, False)
    assert set(vllm["guards"].values()) == {"ok"}
    assert report["settings"]["FSE_PATCH_VERIFY"] == {"value": "sample", "origin": "default"}
    assert report["policy"]["hash"]
    json.dumps(report)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"FSE_PATCH_VERFIY": "all"}, "is set, and nothing reads it; did you mean FSE_PATCH_VERIFY?"),
        ({"FSE_PATCH_WHATEVER_IT_IS": "1"}, "nothing reads it; use one of FSE_PATCH, FSE_PATCH_STRICT, "),
        ({"FSE_PATCH_VERIFY": "some"}, "use off, sample or all"),
        ({"FSE_PATCH_STRICT": "perhaps"}, "use 1 or 0"),
        ({"FSE_PATCH_LM_HEAD": "int8"}, "FSE_PATCH_LM_HEAD='int8': use off or int8:g32"),
        ({"FSE_PATCH": "vlm"}, "unknown engine 'vlm'"),
        ({"FSE_PATCH": "sglang"}, "FSE_PATCH switches sglang on: sglang: not installed here"),
        ({"VLLM_PLUGINS": "another"}, "VLLM_PLUGINS is 'another'; add fse_patch to it"),
        ({"FSE_PATCH_POLICY": "/nowhere.yaml"}, "the policy cannot be read"),
    ],
)
def test_what_is_wrong_with_variables(
    installed: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    for name, value in variables.items():
        installed.setenv(name, value)
    assert words in problems()


def test_what_is_wrong_with_an_engine(installed: pytest.MonkeyPatch) -> None:
    installed.setattr(guards, "guard", lambda patch, *_: "reads other" if patch.id == "load-model" else "")
    assert problems().startswith(
        "fingerprint: vllm 0.32.0: patch load-model of vllm.model_executor.model_loader"
    )
    assert ": reads other; run `fse-patch patches --engine vllm`" in problems()
    installed.setattr(guards, "guard", lambda *_: "")
    installed.setattr(doctor, "entry_points", lambda group: [])
    assert "vllm does not see fse_patch: no entry point in vllm.general_plugins" in problems()
    installed.setattr(doctor, "entry_points", lambda group: [Ours()])
    installed.setattr(guards, "engine_version", lambda book: "0.1.0")
    assert "vllm 0.1.0 is older than every listed release" in problems()


def test_a_new_release_is_as_the_listed_one_whose_seams_it_has(installed: pytest.MonkeyPatch) -> None:
    installed.setattr(guards, "engine_version", lambda book: "0.99.0")
    vllm = next(engine for engine in doctor.examine()["engines"] if engine["engine"] == "vllm")
    newest = facts_of("vllm").listed[-1]
    assert (vllm["is_tested"], vllm["seams_of"]) == (False, newest)
    assert vllm["remark"].startswith(f"release 0.99.0 is new, its seams are those of {newest}")


def test_what_weakens_a_guard_is_a_hazard(installed: pytest.MonkeyPatch) -> None:
    installed.setenv("FSE_PATCH_VERIFY", "off")
    installed.setenv("FSE_PATCH_ALLOW_UNPROVEN", "1")
    report = doctor.examine()
    assert report["ok"]
    assert len(report["hazards"]) == 2


def test_a_quantised_lm_head_is_a_hazard(installed: pytest.MonkeyPatch) -> None:
    installed.setenv("FSE_PATCH_LM_HEAD", "int8:g32")
    (hazard,) = doctor.examine()["hazards"]
    assert hazard.startswith(
        "FSE_PATCH_LM_HEAD=int8:g32: few tokens get their logits from a quantised LM head"
    )
    # A release whose method has another name has no patch for it.
    installed.setattr(guards, "engine_version", lambda book: "0.25.0")
    assert "vllm 0.25.0: FSE_PATCH_LM_HEAD does nothing here" in doctor.examine()["hazards"]


def test_native_fusion_that_is_wrong_is_a_hazard(installed: pytest.MonkeyPatch) -> None:
    entry = {"by_default": True, "condition": "AITER", "wrong": "its slot is never written"}
    installed.setattr(doctor, "fusing", lambda *_: [entry])
    assert any("its slot is never written" in hazard for hazard in doctor.examine()["hazards"])


def test_the_command_says_what_is_wrong() -> None:
    """The environment of these tests has no engine."""
    done = fse_patch("doctor", "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["ok"]) == (1, False)
    assert report["problems"] == [
        "no engine is installed here; install fse-patch into the engine's own environment"
    ]
    text = fse_patch("doctor")
    assert text.returncode == 1
    assert text.stdout.startswith("problem: no engine is installed")
    assert "FSE_PATCH_VERIFY" not in text.stdout
    assert "FSE_PATCH_VERIFY" in fse_patch("doctor", "--verbose").stdout


def test_it_begins_with_what_a_server_does_here(installed: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed.setattr(machine, "here", lambda: machine.Device("cpu", "x86_64", here=True))
    (row,) = doctor.examine()["verdicts"]
    assert (row["engine"], row["served"]) == ("vllm", None)
    assert row["sentence"].startswith("fused, where the checkpoint allows it: vllm 0.32.0 on the CPU")
    fuses = write_checkpoint(tmp_path / "a", config_of("glm4_moe"), model_tensors("glm4_moe"))
    (row,) = doctor.examine(fuses)["verdicts"]
    assert (row["served"], row["reason"]) == ("fused", None)
    # Another source than the one that the patches were written for.
    installed.setattr(guards, "guard", lambda patch, *_: "reads other" if patch.id == "load-model" else "")
    (row,) = doctor.examine()["verdicts"]
    assert (row["served"], row["reason"]) == ("stock", "fingerprint")
    installed.setattr(guards, "guard", lambda *_: "")
    # Without a table of this release; merged alone it is stock. FlashInfer's order is not read.
    for layout, name, told in (
        ("auto", "NVIDIA A100", (None, None)),
        ("auto", "NVIDIA H200", (None, None)),
        ("auto", "NVIDIA B200", ("stock", "backend.layout")),
        ("merged", "NVIDIA H200", ("stock", "slower.unmeasured")),
    ):
        device = machine.Device("cuda", name, here=True)
        installed.setattr(machine, "here", lambda device=device: device)
        installed.setenv("FSE_PATCH_LAYOUT", layout)
        (row,) = doctor.examine()["verdicts"]
        assert (row["served"], row["reason"]) == told, (layout, name)
        assert ("fused, paired" in row["sentence"]) == (told[0] is None)
    installed.delenv("FSE_PATCH_LAYOUT")
    device = machine.Device("cuda", "NVIDIA H200", here=True)
    installed.setattr(machine, "here", lambda: device)
    installed.setattr(guards, "engine_version", lambda book: "0.26.0" if book.engine == "vllm" else "0.1")
    measured, untested = doctor.examine()["verdicts"]
    assert "shapes were measured" in measured["sentence"]
    assert untested["sentence"].startswith("stock: version.untested: sglang 0.1")
    # Of a release in which stock's kernels run on the merged weights, but not where another backend is taken.
    for name, served in (("NVIDIA H100", None), ("NVIDIA B200", "stock")):
        device = machine.Device("cuda", name, here=True)
        installed.setattr(machine, "here", lambda device=device: device)
        assert doctor.examine()["verdicts"][0]["served"] == served, name


def test_it_says_what_the_layout_that_is_asked_for_does(
    installed: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fuses = write_checkpoint(tmp_path / "a", config_of("glm4_moe"), model_tensors("glm4_moe"))
    installed.setenv("FSE_PATCH_LAYOUT", "paired")
    for device, reason in (
        (machine.Device("cpu", "x86_64", here=True), "backend.layout"),
        (machine.Device("cuda", "NVIDIA A100", here=True), None),
    ):
        installed.setattr(machine, "here", lambda device=device: device)
        assert [doctor.examine(at)["verdicts"][0]["reason"] for at in (None, fuses)] == [reason, reason]


def test_a_new_release_with_known_code_serves_a_checkpoint_fused(
    installed: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fuses = write_checkpoint(tmp_path / "a", config_of("glm4_moe"), model_tensors("glm4_moe"))
    installed.setattr(machine, "here", lambda: machine.Device("cpu", "x86_64", here=True))
    installed.setattr(guards, "engine_version", lambda book: "0.99.0")
    assert doctor.examine(fuses)["verdicts"][0]["served"] == "fused"


@pytest.mark.parametrize(("value", "seen"), [("", "sample"), ("ALL", "all"), ("off", "off")])
def test_verify_setting(value: str, seen: str) -> None:
    assert settings.load({"FSE_PATCH_VERIFY": value}).verify == seen


def test_every_variable_has_its_default_in_force() -> None:
    assert settings.load(settings.DEFAULTS) == settings.Settings()
    commands = (Path(__file__).parents[2] / "docs" / "commands.md").read_text()
    assert [name for name in settings.DEFAULTS if f"`{name}`" not in commands] == []


def test_metrics_are_an_extra() -> None:
    pytest.importorskip("torch")
    try:
        import prometheus_client  # noqa: F401
    except ImportError:
        assert not metrics.publish(dict)
