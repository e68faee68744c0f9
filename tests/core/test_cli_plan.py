"""`fse-patch plan` as users run it: a process, its exit status, and what it prints."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .checkpoints import config_of, mlp_tensors, model_tensors, write_checkpoint, write_shard

PLAN_KEYS = {
    "fuse", "reason", "detail", "rule", "engine", "model_type", "num_routed", "num_shared_slots", "top_k",
    "moe_layers", "fused_layers", "scoring", "shared_weight", "routed_scaling_factor",
}  # fmt: skip


def fse_patch(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fse_patch.cli.app", *map(str, arguments)]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("FSE_PATCH")}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=clean | environment)


def plan(folder: Path, *arguments: object) -> tuple[int, dict[str, Any]]:
    done = fse_patch("plan", folder, "--engine", "vllm", "--json", *arguments)
    assert done.stderr == ""
    report: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, report


def sound(folder: Path) -> Path:
    return write_checkpoint(folder, config_of("glm4_moe"), model_tensors("glm4_moe"))


def test_a_checkpoint_that_fuses(tmp_path: Path) -> None:
    status, report = plan(sound(tmp_path))
    assert status == 0
    assert report.keys() >= PLAN_KEYS
    assert report["fuse"] is True
    assert (report["num_routed"], report["num_shared_slots"], report["top_k"]) == (4, 1, 2)
    assert report["moe_layers"] == report["fused_layers"] == [1, 2]
    assert (report["scoring"], report["shared_weight"]) == ("sigmoid", "constant")
    assert report["routed_scaling_factor"] == 2.5
    assert "draft" not in report
    assert "runtime" not in report


def test_a_checkpoint_that_is_refused(tmp_path: Path) -> None:
    sound(tmp_path)
    name = "model.layers.1.mlp.shared_experts.down_proj.weight"
    write_checkpoint(tmp_path, config_of("glm4_moe"), model_tensors("glm4_moe") | {name: ("F32", (64, 32))})
    status, report = plan(tmp_path)
    assert (status, report["fuse"], report["reason"]) == (3, False, "quant.mixed")
    assert report["fused_layers"] == []


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"model_type": "llama"}, None)
    status, report = plan(tmp_path)
    assert (status, report["reason"], report["num_routed"]) == (3, "family.unknown", None)
    assert report.keys() >= PLAN_KEYS


def test_the_draft_has_the_same_keys_and_no_say_in_the_status(tmp_path: Path) -> None:
    tensors = model_tensors("qwen3_next") | mlp_tensors("mtp.layers.0.")
    tensors["mtp.layers.0.mlp.shared_expert.down_proj.weight"] = ("F32", (64, 32))
    status, report = plan(write_checkpoint(tmp_path, config_of("qwen3_next"), tensors))
    assert (status, report["fuse"]) == (0, True)
    assert report["draft"].keys() == report.keys() - {"draft", "lm_head"}
    assert (report["draft"]["fuse"], report["draft"]["reason"]) == (False, "quant.mixed")


def test_runtime_facts_change_nothing_else(tmp_path: Path) -> None:
    _, bare = plan(sound(tmp_path))
    status, report = plan(tmp_path, "--platform", "cpu", "--engine-version", "0.32.0")
    runtime = report.pop("runtime")
    assert (status, report) == (0, bare)
    assert (runtime["version"], runtime["upstream.already"]) == ("tested", False)
    arguments = ("plan", tmp_path, "--engine", "sglang", "--json", "--platform", "cuda")
    done = fse_patch(*arguments, "--engine-version", "0.5.17")
    assert json.loads(done.stdout)["runtime"]["upstream.already"] is True
    done = fse_patch(*arguments, "--engine-version", "9.0")
    assert json.loads(done.stdout)["runtime"]["version"] == "untested"


def test_a_users_policy(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(
        "version: 1\nrules:\n- {id: never, when: {}, fuse: false, reason: disabled, why: w, source: s}\n"
    )
    status, report = plan(sound(tmp_path / "c"), "--policy", own)
    assert (status, report["reason"], report["rule"]) == (3, "disabled", "never")
    # The file that serving reads counts as well.
    arguments = ("plan", tmp_path / "c", "--engine", "vllm", "--json")
    assert json.loads(fse_patch(*arguments).stdout)["rule"] == "unquantised"
    assert json.loads(fse_patch(*arguments, FSE_PATCH_POLICY=str(own)).stdout)["rule"] == "never"
    assert_one_line(fse_patch(*arguments, FSE_PATCH_STRICT="maybe"), "FSE_PATCH_STRICT='maybe'")


def test_people_get_a_table(tmp_path: Path) -> None:
    brief = fse_patch("plan", sound(tmp_path), "--engine", "vllm")
    assert brief.stdout.startswith("can be fused in vllm: 2 sparse layers")
    assert len(brief.stdout.splitlines()) == 2
    done = fse_patch("plan", tmp_path, "--engine", "vllm", "--verbose")
    assert done.returncode == 0
    assert done.stdout.startswith(brief.stdout)
    assert "1-2 (2)" in done.stdout
    assert "sigmoid" in done.stdout


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def wrong_type(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config_of("glm4_moe", n_routed_experts="4")))


def huge_number(folder: Path) -> None:
    text = json.dumps(config_of("glm4_moe")).replace(
        '"num_hidden_layers": 3', '"num_hidden_layers": 1' + "0" * 5000
    )
    (folder / "config.json").write_text(text)


def model_type_number(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": 3}')


def truncated(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    os.truncate(path, path.stat().st_size - 1)


def empty_shard(folder: Path) -> None:
    next(folder.glob("*.safetensors")).write_bytes(b"")


def repeated_tensor(folder: Path) -> None:
    write_shard(folder / "other.safetensors", {"lm_head.weight": ("BF16", (16, 64))})


def missing_shard(folder: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def broken_modelopt(folder: Path) -> None:
    (folder / "hf_quant_config.json").write_text("nothing")


def config_folder(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


FAULTS: list[tuple[Callable[[Path], None], str]] = [
    (no_config, "has no config.json"),
    (broken_config, "config.json: not valid JSON"),
    (list_config, "holds a JSON list"),
    (wrong_type, "'n_routed_experts' is '4'; expected a whole number"),
    (huge_number, "config.json: "),
    (model_type_number, "'model_type' is 3; expected a string"),
    (truncated, "truncated: "),
    (empty_shard, "truncated: 0 bytes"),
    (repeated_tensor, "'lm_head.weight' is also in model-00001-of-00001.safetensors"),
    (missing_shard, "model-00002-of-00002.safetensors: missing"),
    (broken_modelopt, "hf_quant_config.json: not valid JSON"),
    (config_folder, "has no config.json"),
]


def assert_one_line(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    if "--json" in done.args:
        report = json.loads(done.stdout)
        assert report["exit_status"] == 2
        assert report["error"] == done.stderr.strip().removeprefix("fse-patch: ")
    else:
        assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr


@pytest.mark.parametrize(("plant", "message"), FAULTS, ids=[plant.__name__ for plant, _ in FAULTS])
def test_bad_input_is_one_line_and_status_2(
    tmp_path: Path, plant: Callable[[Path], None], message: str
) -> None:
    folder = sound(tmp_path / "c")
    plant(folder)
    done = fse_patch("plan", folder, "--engine", "vllm", "--json")
    assert_one_line(done, message)
    assert str(tmp_path) in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "vlm"], "'vlm': unknown engine; did you mean vllm?"),
        (["--engine", "vllm", "--platform", "tpu"], "unknown platform 'tpu'"),
        (["--engine", "vllm", "--engine-version", "newest"], "'newest' is no version number"),
        (["--engine", "vllm", "--policy", "gone.yaml"], "gone.yaml: the policy cannot be read"),
    ],
)
def test_bad_options_are_one_line_and_status_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    assert_one_line(fse_patch("plan", sound(tmp_path), *arguments), message)


def test_bad_policies_name_file_line_and_field(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("version: 1\nrules:\n- {id: a, when: {}, fuse: maybe, why: w, source: s}\n")
    done = fse_patch("plan", sound(tmp_path / "c"), "--engine", "vllm", "--policy", own)
    assert_one_line(done, f"{own}: line 3: field 'rules[0].fuse': ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan"], "missing argument 'checkpoint'; see fse-patch plan --help"),
        (["plann"], "no command 'plann'; did you mean plan?"),
        (["nothing"], "no command 'nothing'; use one of plan, doctor, "),
        (["plan", "x", "--nothing"], "no such option: --nothing"),
        (["plan", "x", "--engine", "vlm"], "'vlm': unknown engine; did you mean vllm?"),
        (["plan", "x", "--nothing", "--json"], "no such option: --nothing"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(arguments: list[str], message: str) -> None:
    assert_one_line(fse_patch(*arguments), message)


def test_plan_loads_neither_torch_nor_numpy_nor_an_engine(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from fse_patch.cli.app import main\n"
        f"sys.argv = ['fse-patch', 'plan', {str(sound(tmp_path))!r}, '--engine', 'vllm', *sys.argv[1:]]\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(','.join(sys.modules), file=sys.stderr)\n"
    )
    for extra in (["--verbose"], ["--json"], ["--json", "--platform", "cpu", "--engine-version", "0.32.0"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *extra], capture_output=True, text=True, timeout=60
        )
        loaded = set(done.stderr.strip().split(","))
        assert "fse_patch.fusion_core.evidence.gather" in loaded, done.stderr
        assert not loaded & {"torch", "numpy", "vllm", "sglang", "safetensors", "transformers"}
        assert ("rich.table" in loaded) == ("--json" not in extra), "control: what is loaded is seen"


def big_checkpoint(folder: Path) -> int:
    """A checkpoint with over 60 000 tensors in 40 shards; returns the number of tensors."""
    experts, layers = 512, 40
    config = config_of("qwen3_next", num_experts=experts, num_experts_per_tok=10, num_hidden_layers=layers)
    tensors = model_tensors("qwen3_next", layers=range(layers), experts=experts)
    write_checkpoint(folder, config, tensors, shards=40, index=True)
    return len(tensors)


def test_sixty_thousand_tensors_take_under_a_second(tmp_path: Path) -> None:
    assert big_checkpoint(tmp_path) > 60_000
    seconds = []
    for _ in range(5):
        start = processor_time()
        status, report = plan(tmp_path)
        seconds.append(processor_time() - start)
        assert (status, len(report["fused_layers"])) == (0, 40)
    print(f"plan, 60 000 tensors: median {statistics.median(seconds):.3f} s of {sorted(seconds)}")
    # Processor time, and the best run: others may hold the processors.
    assert min(seconds) < 1.0
    # Control: all 60 000 are looked at; the last one decides.
    write_shard(
        tmp_path / "model-00040-of-00040.safetensors",
        {
            name: ("F32" if name.endswith("layers.39.mlp.experts.511.down_proj.weight") else dtype, shape)
            for name, (dtype, shape) in last_shard(tmp_path).items()
        },
    )
    status, report = plan(tmp_path)
    assert (status, report["reason"]) == (3, "quant.mixed")
    assert "expert 511" in report["detail"]


def processor_time() -> float:
    """Seconds that this process's ended children took of the processors."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def last_shard(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    raw = (folder / "model-00040-of-00040.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    header.pop("__metadata__")
    return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
