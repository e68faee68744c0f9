"""What is said of the server that a launch command would start."""

from __future__ import annotations

from pathlib import Path

import pytest

from fse_patch.adapters.patching import guards
from fse_patch.launch import machine, modes
from fse_patch.launch.machine import named

from .golden import write_row
from .plans import GOLDEN, plan
from .test_cli_plan import assert_one_line, fse_patch, sound


@pytest.mark.parametrize(
    ("name", "platform", "full"),
    [
        ("cpu", "cpu", "cpu"),
        ("H200", "cuda", "NVIDIA H200"),
        ("NVIDIA B200", "cuda", "NVIDIA B200"),
        ("AMD Instinct MI300X", "rocm", "AMD Instinct MI300X"),
        ("MI355X", "rocm", "MI355X"),
        ("gfx942", "rocm", "gfx942"),
    ],
)
def test_devices_by_name(name: str, platform: str, full: str) -> None:
    found = named(name)
    assert (found.platform, found.name, found.here) == (platform, full, False)


def test_the_device_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "NVIDIA", tmp_path / "none")
    monkeypatch.setattr(machine, "AMD", tmp_path / "none")
    assert machine.here().platform == "cpu"
    (tmp_path / "gpus" / "0000").mkdir(parents=True)
    (tmp_path / "gpus" / "0000" / "information").write_text("Model: \t\t NVIDIA H200\nIRQ:   1\n")
    monkeypatch.setattr(machine, "NVIDIA", tmp_path / "gpus")
    assert (machine.here().platform, machine.here().name) == ("cuda", "NVIDIA H200")


def test_a_command_in_quotes_is_the_same(tmp_path: Path) -> None:
    folder = sound(tmp_path)
    given = ["--engine-version", "0.32.0", "--device", "cpu", "--"]
    apart = plan(folder, *given, "vllm", "serve", "M", "-tp", "2")
    assert plan(folder, *given, "vllm serve M -tp 2") == apart
    assert apart[1]["runtime"]["asked"]["tp"] == 2


def test_variables_of_the_command_hold(tmp_path: Path) -> None:
    folder = sound(tmp_path)
    given = ["--engine-version", "9.9", "--device", "cpu", "--"]
    assert plan(folder, *given, "vllm", "serve", "M")[1]["runtime"]["reason"] == "version.untested"
    assert plan(folder, *given, "FSE_PATCH=0", "vllm", "serve", "M")[1]["runtime"]["reason"] == "disabled"


@pytest.mark.parametrize(
    ("release", "words"),
    [
        ("9.9", "is not listed, and its code is not here to be compared; ask again where it is installed"),
        ("0.1", "is older than every listed release ("),
    ],
)
def test_a_release_that_is_only_named(release: str, words: str, tmp_path: Path) -> None:
    folder = sound(tmp_path)
    given = ["--engine-version", release, "--device", "cpu", "--"]
    runtime = plan(folder, *given, "vllm", "serve", "M")[1]["runtime"]
    assert (runtime["served"], runtime["reason"]) == ("stock", "version.untested")
    assert runtime["detail"].startswith(f"vllm {release} {words}")


def test_layouts_that_a_command_asks_for(tmp_path: Path) -> None:
    folder = sound(tmp_path)

    def told(device: str, *words: str) -> tuple[str, str | None, str | None]:
        given = ["--engine-version", "0.26.0", "--device", device, "--", *words, "vllm", "serve", "M"]
        runtime = plan(folder, *given)[1]["runtime"]
        return runtime["served"], runtime["layout"], runtime["reason"]

    # Merged it would run as stock, without a table: paired may gain.
    assert told("NVIDIA H100") == ("fused", "paired", None)
    assert told("NVIDIA H100", "FSE_PATCH_LAYOUT=merged") == ("fused", "merged", None)
    assert told("NVIDIA H100", "FSE_PATCH_LAYOUT=paired") == ("fused", "paired", None)
    assert told("cpu", "FSE_PATCH_LAYOUT=paired") == ("stock", None, "backend.layout")
    assert told("cpu") == ("fused", "merged", None)
    done = fse_patch(
        *("plan", folder, "--engine-version", "0.26.0", "--device", "NVIDIA H100"),
        *("--", "FSE_PATCH_LAYOUT=paired", "FSE_PATCH=1", "vllm", "serve", "M"),
    )
    assert done.stdout.startswith("fused, paired: few tokens, measured at the first start; vllm 0.26.0 on")


def test_plugins_that_are_not_allowed_are_not_loaded(tmp_path: Path) -> None:
    folder = sound(tmp_path)
    given = ["--engine-version", "0.32.0", "--device", "cpu", "--"]
    for allowed, reason in (("other", "disabled"), ("other,fse_patch", None), ("", "disabled")):
        runtime = plan(folder, *given, f"VLLM_PLUGINS={allowed}", "vllm", "serve", "M")[1]["runtime"]
        assert runtime["reason"] == reason, allowed
    # The launch wrapper needs no plugin.
    given = ["--engine-version", "0.5.20", "--device", "cpu", "--", "SGLANG_PLUGINS=none"]
    for module, reason in (("fse_patch.launch_sglang", None), ("sglang.launch_server", "disabled")):
        assert plan(folder, *given, "python", "-m", module, "--model", "M")[1]["runtime"]["reason"] == reason


def test_a_strict_server_that_contradicts_itself_does_not_start(tmp_path: Path) -> None:
    folder = sound(tmp_path)
    given = [
        "--engine-version",
        "0.32.0",
        "--device",
        "cpu",
        "--",
        "FSE_PATCH_STRICT=1",
        "vllm",
        "serve",
        "M",
    ]
    assert plan(folder, *given, "--enable-lora")[1]["runtime"]["ends"] is True
    assert plan(folder, *given)[1]["runtime"]["ends"] is False
    done = fse_patch("plan", folder, *given, "--enable-lora")
    assert done.stdout.startswith("does not start (FSE_PATCH_STRICT=1): lora: ")
    unset = ["--engine-version", "0.32.0", "--device", "cpu", "--", "vllm", "serve", "M", "--enable-lora"]
    assert plan(folder, *unset)[1]["runtime"]["ends"] is False


def test_the_first_line_is_the_verdict(tmp_path: Path) -> None:
    folder = sound(tmp_path)
    given = ["--engine-version", "0.32.0", "--device", "cpu", "--"]
    done = fse_patch("plan", folder, *given, "vllm", "serve", folder)
    first, second = done.stdout.splitlines()
    assert first == "fused, merged: fused always (a CPU, where no speed is promised); vllm 0.32.0 on a CPU"
    assert "FSE_PATCH=1" in second
    done = fse_patch("plan", folder, *given, "FSE_PATCH=1", "vllm", "serve", folder)
    assert len(done.stdout.splitlines()) == 1
    done = fse_patch("plan", folder, *given, "vllm", "serve", folder, "--enable-lora")
    assert done.stdout.startswith("stock: lora: LoRA adapters may change experts")
    assert done.returncode == 3


def test_another_source_of_the_installed_release_is_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sound(tmp_path)
    monkeypatch.setattr(guards, "engine_version", lambda book: "0.32.0")
    given = ["--device", "cpu", "--", "vllm", "serve", "M"]
    for state, reason in (("", None), ("reads other", "fingerprint")):
        monkeypatch.setattr(guards, "guard", lambda *_, state=state: state)
        assert plan(folder, *given)[1]["runtime"]["reason"] == reason
    # Of a release that is only named, nothing is read here.
    assert plan(folder, "--engine-version", "0.32.0", *given)[1]["runtime"]["reason"] is None


def test_kernels_for_amx_are_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sound(tmp_path)
    monkeypatch.setattr(machine, "here", lambda: machine.Device("cpu", "x86_64", here=True, amx=True))
    found: list[str] = []
    monkeypatch.setattr(modes.metadata, "distributions", lambda name: iter(["it"] if name in found else []))
    given = ["--engine-version", "0.5.20", "--", "sglang", "serve", "--model", "M"]
    assert plan(folder, *given)[1]["runtime"]["served"] == "fused"
    found.append("sgl-kernel")
    assert plan(folder, *given)[1]["runtime"]["reason"] == "slower.unmeasured"
    # vLLM has none of its own.
    given = ["--engine-version", "0.32.0", "--", "vllm", "serve", "M"]
    assert plan(folder, *given)[1]["runtime"]["served"] == "fused"


def test_without_an_engine_the_release_is_asked_for(tmp_path: Path) -> None:
    done = fse_patch("plan", sound(tmp_path), "--", "vllm", "serve", "M")
    assert_one_line(done, "vllm is not installed here; give --engine-version")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "sglang", "--", "vllm", "serve", "M"], "the command behind -- launches vllm"),
        (["--device", "H200", "--platform", "cpu", "--engine", "vllm"], "is a device of cuda, not of cpu"),
        ([], "give --engine, or the command that starts the server"),
        (["--", "vlm", "serve"], "no launch command that is known"),
        (["--", "vllm serve 'M"], "No closing quotation"),
    ],
)
def test_wrong_targets_are_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    assert_one_line(fse_patch("plan", sound(tmp_path), *arguments), message)


def test_a_draft_is_asked_about_where_it_is_built(tmp_path: Path) -> None:
    folder = write_row(tmp_path, GOLDEN["qwen3.5-35b-text-bf16-mtp"])
    given = ["--engine-version", "0.32.0", "--device", "cpu", "--", "vllm", "serve", "M"]
    assert "draft" not in plan(folder, *given)[1]["runtime"]
    speculative = plan(folder, *given, "--speculative-config.method", "mtp")[1]["runtime"]
    assert speculative["draft"]["served"] == "fused"
