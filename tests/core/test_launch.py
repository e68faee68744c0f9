"""What a launch command asks for, and what is said of the server that it would start."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from fse_patch.adapters.patching import guards
from fse_patch.cli.app import app
from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.engines import Refusal, facts_of
from fse_patch.fusion_core.reasons import REASONS
from fse_patch.launch import flags, machine, modes
from fse_patch.launch.command import Asked, engine_of_command, read
from fse_patch.launch.machine import named
from fse_patch.patches import ENGINES

from .golden import ROWS, write_row
from .test_cli_plan import assert_one_line, fse_patch, sound

DEPLOYMENTS: list[dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("deployments.yaml").read_text())
SHAPES = Path(__file__).parents[2] / "benchmarks" / "shapes"
BEST = {"vllm": "0.26.0", "sglang": "0.5.17"}
GOLDEN = {row["id"]: row for row in ROWS}


def asked(command: str, release: str = "", **environment: str) -> Asked:
    return read(shlex.split(command), release, environment)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("vllm serve M", {"tp": 1, "ep": False, "dtype": "auto", "load_format": "auto", "lora": False}),
        ("vllm serve M --tensor-parallel-size 4", {"tp": 4}),
        ("vllm serve M --tensor_parallel_size=4", {"tp": 4}),
        ("vllm serve M -tp 4 -pp 2 -dp 8 -ep", {"tp": 4, "pp": 2, "dp": 8, "ep": True}),
        ("vllm serve M --tensor-par 4", {"tp": 4}),
        ("vllm serve M --enable-expert-parallel --no-enable-expert-parallel", {"ep": False}),
        ("vllm serve M -q fp8 --dtype half", {"quantization": "fp8", "dtype": "half"}),
        ("vllm serve M -O3 --all2all-backend pplx", {"all2all": "pplx"}),
        ("vllm serve M -cc.mode 3 --speculative-config.method mtp", {"speculative": "mtp"}),
        ('vllm serve M --speculative-config \'{"model": "d"}\'', {"speculative": "d"}),
        ("vllm serve M --enable-lora --lora-modules a=b c=d", {"lora": True}),
        ("VLLM_BATCH_INVARIANT=1 vllm serve M", {"batch_invariant": True}),
        ("python3 -m vllm.entrypoints.openai.api_server --model M --enable-eplb", {"eplb": True}),
        ("/usr/bin/numactl -N 0 vllm serve M -tp 2", {"tp": 2}),
        ("python -m sglang.launch_server --model M --tp 8 --ep 8", {"tp": 8, "ep": 8}),
        ("python -m sglang.launch_server --model-path=M --tp-size 2 --dp-size 2", {"tp": 2, "dp": 2}),
        ("python -m fse_patch.launch_sglang --model M --lora-paths a=b", {"lora_paths": "a=b"}),
        ("sglang serve --model M --moe-a2a-backend deepep", {"all2all": "deepep"}),
    ],
)
def test_flags_are_read_as_the_engine_reads_them(command: str, expected: dict[str, Any]) -> None:
    found = asked(command)
    assert found.model == "M"
    assert {name: found[name] for name in expected} == expected


def test_the_command_line_goes_before_the_config_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "model: M\ntensor-parallel-size: 4\nenable-expert-parallel: true\nspeculative-config: {method: mtp}\n"
    )
    found = asked(f"vllm serve --config {file} --tensor-parallel-size 2")
    assert (found.model, found["tp"], found["ep"], found["speculative"]) == ("M", 2, True, "mtp")


@pytest.mark.parametrize(
    ("command", "on"),
    [
        ("vllm serve M", None),
        ("FSE_PATCH=1 vllm serve M", True),
        ("env FSE_PATCH=sglang vllm serve M", False),
        ("FSE_PATCH=0 vllm serve M", False),
        ("python -m sglang.launch_server --model M", None),
        ("python -m fse_patch.launch_sglang --model M", True),
    ],
)
def test_whether_it_is_switched_on(command: str, on: bool | None) -> None:
    assert asked(command).switched_on is on


@pytest.mark.parametrize(
    ("command", "release", "message"),
    [
        (
            "vllm serve M --tensor-paralel-size 2",
            "0.32.0",
            "no flag of vllm 0.32.0; did you mean --tensor-parallel-size?",
        ),
        ("vllm serve M --zzz", "", "--zzz: no flag of vllm 0.28.0, "),
        ("vllm serve M -tp two", "", "--tensor-parallel-size 'two': not a whole number"),
        ("vllm serve M -tp", "", "expected one argument"),
        ("vllm serve M --speculative-config mtp", "", "--speculative-config: not JSON: mtp"),
        ("vllm serve M --config /none.yaml", "", "/none.yaml"),
        ("vlm serve M", "", "vlm serve M: no launch command that is known; known are vllm serve; "),
        ("", "", "nothing: no launch command"),
    ],
)
def test_what_cannot_be_read_is_named(command: str, release: str, message: str) -> None:
    with pytest.raises(FsePatchError, match=re.escape(message)):
        asked(command, release)


def test_a_flag_of_another_release_is_none_of_this_one() -> None:
    row = next(f for f in flags.flags_of("sglang").flags if f.releases == ["0.5.23"] and f.takes == "nothing")
    command = f"sglang serve --model M {row.names[0]}"
    assert asked(command, "0.5.23").model == asked(command, "").model == "M"
    with pytest.raises(FsePatchError, match=r"no flag of sglang 0\.5\.18"):
        asked(command, "0.5.18")


@pytest.mark.parametrize("engine", ENGINES)
def test_the_section_names_flags_that_there_are(engine: str) -> None:
    launch = facts_of(engine).launch
    assert launch is not None
    known = {flag.to for flag in flags.flags_of(engine).flags}
    assert {ask.flag for ask in launch.asks.values() if ask.flag} | set(launch.model) <= known
    assert all(ask.flag or ask.variable for ask in launch.asks.values())
    assert {row.reason for row in launch.refuses} <= set(REASONS)
    for command in launch.commands:
        assert engine_of_command(f"python {command}".split()) == engine


@pytest.mark.parametrize(
    ("row", "held", "free"),
    [
        ({"one_of": [True]}, True, False),
        ({"above": 1}, 2, 1),
        ({"none_of": ["auto", "triton"]}, "flashinfer", "auto"),
        ({"none_of": ["auto"]}, "x", None),
        ({"given": True}, "x", None),
    ],
)
def test_rows_of_refusals(row: dict[str, Any], held: Any, free: Any) -> None:
    made = Refusal(ask="a", **row)
    assert (made.holds(held), made.holds(free)) == (True, False)


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


def plan(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """In this process: a hundred of them would take minutes to start."""
    clean = {name: None for name in os.environ if name.startswith("FSE_PATCH")}
    done = CliRunner().invoke(app, ["plan", str(folder), "--json", *arguments], env=clean)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, json.loads(done.stdout)


def checkpoint(name: str, out: Path) -> Path:
    """A row of golden/, or the config of a shape that was measured."""
    return write_row(out, GOLDEN[name]) if name in GOLDEN else SHAPES / name


@pytest.mark.parametrize("row", DEPLOYMENTS, ids=lambda row: f"{row['id']}-{row['release']}")
def test_real_deployments(row: dict[str, Any], tmp_path: Path) -> None:
    folder = checkpoint(row["checkpoint"], tmp_path)
    words = shlex.split(row["command"].format(m=folder))
    engine = engine_of_command(words)
    assert engine is not None
    for release, expected in ((row["release"], row["as_run"]), (BEST[engine], row["best"])):
        command = ["--engine-version", release, "--device", row["device"], "--", *words]
        status, report = plan(folder, *command)
        runtime = report["runtime"]
        served = runtime["served"]
        assert f"{served} {runtime['layout'] or runtime['reason']}" == expected, runtime["detail"]
        assert (runtime["layout"] is None) == (runtime["reason"] is not None) == (served != "fused")
        assert status == (0 if served == "fused" else 3)
        assert (runtime["modes"] is not None) >= (served == "fused")
        # What a table knows is told; where nothing runs of ours, nothing is gained.
        by_table = ".yaml" in runtime["detail"] and runtime["modes"] is not None
        assert (runtime["gain"] is not None) == by_table


def test_thirty_two_deployments_are_there() -> None:
    assert len({row["id"] for row in DEPLOYMENTS}) == len(DEPLOYMENTS) == 32


# Flags beside an H200 that fuses, and the code that each of them leads to.
FLAGS = [
    ("vllm", "", None),
    # In one process nothing is spread.
    ("vllm", "--enable-expert-parallel", None),
    ("vllm", "-tp 2 --enable-expert-parallel", "slower.unmeasured"),
    ("vllm", "-tp 2 --enable-expert-parallel --moe-backend flashinfer_cutlass", "parallel.ep"),
    ("vllm", "--enable-eplb", "parallel.eplb"),
    ("vllm", "-dp 2", "parallel.dp"),
    ("vllm", "--prefill-context-parallel-size 2", "parallel.dp"),
    ("vllm", "--enable-lora", "lora"),
    ("vllm", "--enable-lora --lora-target-modules q_proj o_proj", None),
    ("vllm", "--enable-lora --lora-target-modules q_proj down_proj", "lora"),
    ("vllm", "-dp 2 --enable-expert-parallel", "parallel.all2all"),
    ("vllm", "--cpu-offload-gb 4", "memory.offload"),
    ("vllm", "--enable-sleep-mode", "memory.sleep"),
    ("vllm", "-tp 3", "parallel.tp"),
    ("vllm", "--enable-return-routed-experts", "routing.capture"),
    ("vllm", '--weight-transfer-config \'{"backend": "other"}\'', "load.format"),
    ("vllm", "--quantization fp8", "quant.online"),
    ("vllm", "--moe-backend flashinfer_cutlass", "slower.unmeasured"),
    ("vllm", "--dtype float32", "slower.unmeasured"),
    ("vllm", "--hf-overrides '{\"num_experts_per_tok\": 4}'", "config.differs"),
    ("vllm", "--hf-overrides '{\"max_position_embeddings\": 4096}'", None),
    ("vllm", "--load-format runai_streamer_sharded", "load.format"),
    ("sglang", "", None),
    ("sglang", "--disable-shared-experts-fusion", "disabled"),
    ("sglang", "--tp 2 --ep-size 2", "slower.unmeasured"),
    ("sglang", "--enable-waterfill", "backend.layout"),
    ("sglang", "--elastic-ep-join-mode x", "backend.layout"),
    ("sglang", "--moe-a2a-backend deepep", "parallel.all2all"),
    ("sglang", "--dp-size 2", "parallel.dp"),
    ("sglang", "--pp-size 2", None),
    ("sglang", "--moe-runner-backend flashinfer_cutlass", "backend.topk_format"),
    ("sglang", "--enable-deterministic-inference", "slower.unmeasured"),
    ("sglang", "--expert-distribution-recorder-mode stat", "routing.capture"),
]
COMMANDS = {"vllm": "vllm serve M", "sglang": "python -m sglang.launch_server --model-path M"}


@pytest.mark.parametrize(("engine", "flags_given", "reason"), FLAGS)
def test_each_flag_has_its_reason(engine: str, flags_given: str, reason: str | None, tmp_path: Path) -> None:
    folder = checkpoint("qwen3.5_35b_text", tmp_path)
    words = shlex.split(f"{COMMANDS[engine]} {flags_given}")
    _, report = plan(folder, "--engine-version", BEST[engine], "--device", "NVIDIA H200", "--", *words)
    assert report["runtime"]["reason"] == reason, report["runtime"]["detail"]
    # What the checkpoint is does not depend on the launch, but for the files that are loaded.
    assert report["fuse"] is ("--load-format" not in flags_given)


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

    # No device has run it paired: by itself it is merged, and runs as stock would.
    assert told("NVIDIA H100") == ("fused", "merged", None)
    assert told("NVIDIA H100", "FSE_PATCH_LAYOUT=merged") == ("fused", "merged", None)
    assert told("NVIDIA H100", "FSE_PATCH_LAYOUT=paired") == ("fused", "paired", None)
    assert told("cpu", "FSE_PATCH_LAYOUT=paired") == ("stock", None, "backend.layout")
    assert told("cpu") == ("fused", "merged", None)
    done = fse_patch(
        *("plan", folder, "--engine-version", "0.26.0", "--device", "NVIDIA H100"),
        *("--", "FSE_PATCH_LAYOUT=paired", "FSE_PATCH=1", "vllm", "serve", "M"),
    )
    assert done.stdout.startswith("fused, paired: few tokens, measured at the first start; vllm 0.26.0 on")


# Beside FSE_PATCH_LAYOUT=paired, and the code that each leads to.
PAIRED_FLAGS = [
    ("vllm", "", "-tp 2 --enable-expert-parallel", None),
    ("vllm", "VLLM_BATCH_INVARIANT=1", "", "slower.unmeasured"),
    ("vllm", "", "--enable-lora", "lora"),
    # Weights that stay where the engine keeps them are updated as it does.
    ("vllm", "", '--weight-transfer-config \'{"backend": "other"}\'', None),
    ("sglang", "", "--tp 2 --ep-size 2", None),
    ("sglang", "", "--moe-runner-backend flashinfer_cutlass", "backend.layout"),
    ("sglang", "", "--enable-two-batch-overlap", "backend.layout"),
    ("sglang", "", "--enable-deterministic-inference", "slower.unmeasured"),
    ("sglang", "", "--disable-shared-experts-fusion", "disabled"),
    ("sglang", "SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED=1", "", "backend.layout"),
]


@pytest.mark.parametrize(("engine", "variables", "flags_given", "reason"), PAIRED_FLAGS)
def test_flags_beside_the_paired_layout(
    engine: str, variables: str, flags_given: str, reason: str | None, tmp_path: Path
) -> None:
    folder = checkpoint("qwen3.5_35b_text", tmp_path)
    words = shlex.split(f"FSE_PATCH_LAYOUT=paired {variables} {COMMANDS[engine]} {flags_given}")
    _, report = plan(folder, "--engine-version", BEST[engine], "--device", "NVIDIA H200", "--", *words)
    runtime = report["runtime"]
    assert (runtime["reason"], runtime["layout"]) == (reason, None if reason else "paired"), runtime["detail"]


# Rows of golden/, and what the paired kernels do not read of them.
UNREAD = [
    ("qwen3.6-35b-gptq-routed-only", ""),
    ("qwen3.6-35b-fp8-block", ""),
    ("qwen3.5-35b-bf16-stacked", ""),
    ("qwen3-next-config-only", ""),
    ("qwen3-next-w4a16", "shared packed weight_packed/weight_scale/weight_shape"),
    ("qwen3.6-35b-nvfp4", "shared packed input_global_scale/weight_global_scale/weight_packed/weight_scale"),
    ("qwen3.5-122b-nvfp4-shared-in-bf16", "routed nvfp4"),
    ("qwen3.5-35b-gptq-8bit-routed-only", "routed int8-gptq"),
    ("qwen3.5-35b-int8", "shared I8"),
    ("qwen3-next-bitsandbytes-shared-skipped", "routed bitsandbytes-4bit"),
]


@pytest.mark.parametrize(("name", "unread"), UNREAD)
def test_formats_that_the_paired_kernels_do_not_read(name: str, unread: str, tmp_path: Path) -> None:
    folder = checkpoint(name, tmp_path)
    given = ["--engine-version", "0.26.0", "--device", "NVIDIA H200"]
    runtime = plan(folder, *given, "--", "FSE_PATCH_LAYOUT=paired", "vllm", "serve", "M")[1]["runtime"]
    assert runtime["reason"] == ("backend.layout" if unread else None)
    assert runtime["detail"].endswith(unread)


def test_experts_that_constants_stand_in_for(tmp_path: Path) -> None:
    folder = sound(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    given = ["--engine-version", "0.33.0", "--device", "cpu", "--", "vllm", "serve", "M"]
    assert plan(folder, *given)[1]["runtime"]["reason"] is None
    (folder / "config.json").write_text(json.dumps({**config, "approximate_experts": {"0": [1]}}))
    assert plan(folder, *given)[1]["runtime"]["reason"] == "backend.routing"


def test_experts_spread_whole_run_where_that_is_allowed(tmp_path: Path) -> None:
    folder = checkpoint("qwen3.5_35b_text", tmp_path)
    words = shlex.split("FSE_PATCH_ALLOW_UNMEASURED=1 vllm serve M -tp 2 --enable-expert-parallel")
    for device, reason in (("NVIDIA H200", None), ("cpu", "parallel.ep"), ("MI300X", "parallel.ep")):
        given = ["--engine-version", "0.26.0", "--device", device, "--", *words]
        assert plan(folder, *given)[1]["runtime"]["reason"] == reason, device


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


def test_engine_arguments_are_checked_by_name() -> None:
    flags.check_arguments("vllm", "0.32.0", ["tensor_parallel_size", "dtype"])
    flags.check_arguments("vllm", "0.99.0", ["an_argument_of_tomorrow"])
    with pytest.raises(FsePatchError, match=r"'tensor_paralel_size'; did you mean tensor_parallel"):
        flags.check_arguments("vllm", "0.32.0+cpu", ["tensor_paralel_size"])


def test_a_draft_is_asked_about_where_it_is_built(tmp_path: Path) -> None:
    folder = write_row(tmp_path, GOLDEN["qwen3.5-35b-text-bf16-mtp"])
    given = ["--engine-version", "0.32.0", "--device", "cpu", "--", "vllm", "serve", "M"]
    assert "draft" not in plan(folder, *given)[1]["runtime"]
    speculative = plan(folder, *given, "--speculative-config.method", "mtp")[1]["runtime"]
    assert speculative["draft"]["served"] == "fused"
