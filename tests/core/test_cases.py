"""Things that a first user tries, and what is said then: the kinds of inputs that went wrong once."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fse_patch import settings
from fse_patch.cli import verify
from fse_patch.errors import FsePatchError, did_you_mean
from fse_patch.lab.verify import VerifyJob, judge

from .checkpoints import config_of, model_tensors, write_checkpoint
from .test_cli_plan import assert_one_line, fse_patch
from .test_verify_arms import DECISION

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", config_of("glm4_moe"), model_tensors("glm4_moe"))


# The command and its arguments, and what its one line has in it.
SAID = [
    (["plan", "{model}/config.json", "--engine", "vllm"], "config.json: a file; give its folder: {model}"),
    (["plan", "{tmp}/some.gguf", "--engine", "vllm"], "GGUF is not supported"),
    (["plan", "~/nothing-here", "--engine", "vllm"], "nothing-here: no such folder"),
    (["verify", "org/name", "--engine", "vllm"], "get it by `hf download org/name`"),
    (["verify", "{model}", "--engine", "vllm", "--timeout", "-5"], "invalid value for '--timeout'"),
    (["verify", "{model}", "--engine", "vllm", "--dtype", "fp16"], "'fp16': unknown; did you mean float16?"),
    (["verify", "{model}", "--engine", "vllm", "--dtype", "bfloat"], "did you mean bfloat16?"),
    (["bench", "{model}", "--tokens", "1,x"], "--tokens '1,x': give numbers"),
    (["bench", "{model}", "--quant", "fp8"], "--quant 'fp8': unknown; use fp8-block or fp8-tensor"),
    (["tune", "{model}", "--out", "/none/t.yaml"], "--out /none/t.yaml: there is no such folder"),
    (["doctor", "{tmp}/gone"], "gone: no such folder"),
]


@pytest.mark.parametrize(("arguments", "message"), SAID, ids=[" ".join(a[:4]) for a, _ in SAID])
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_wrong_input_is_one_line(arguments: list[str], message: str, as_json: bool, model: Path) -> None:
    (model.parent / "some.gguf").write_bytes(b"GGUF")
    places = {"model": model, "tmp": model.parent}
    given = [word.format(**places) for word in arguments]
    assert_one_line(fse_patch(*given, *["--json"] * as_json), message.format(**places))


def test_a_home_folder_and_upper_case_are_understood(model: Path) -> None:
    done = fse_patch("plan", "~/model", "--engine", "vLLM", "--json", HOME=str(model.parent))
    assert (done.returncode, json.loads(done.stdout)["fuse"]) == (0, True)


@pytest.mark.parametrize("command", [[], ["plan"], ["policy", "explain"]])
def test_help_has_a_short_form(command: list[str]) -> None:
    assert fse_patch(*command, "-h").stdout == fse_patch(*command, "--help").stdout != ""


@pytest.mark.parametrize(
    ("typed", "word"),
    [("pl", "plan"), ("plan --engine-v", "--engine-version"), ("verify --engine ", "sglang")],
)
def test_the_shell_completes(typed: str, word: str) -> None:
    asked = {"_FSE_PATCH_COMPLETE": "complete_bash", "COMP_WORDS": f"fse-patch {typed}"}
    told = fse_patch(**asked, COMP_CWORD=str(len(typed.split(" ")))).stdout.split()
    assert word in told
    assert "bench" not in told


@pytest.mark.parametrize("command", [[], ["policy"]])
def test_a_group_alone_shows_its_help(command: list[str]) -> None:
    done = fse_patch(*command)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == fse_patch(*command, "--help").stdout


def test_a_name_of_the_hub_in_the_local_cache_is_looked_up(model: Path, tmp_path: Path) -> None:
    commit = "a" * 40
    repository = tmp_path / "hub" / "models--org--name"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).symlink_to(model)
    found = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    for command in (["plan", "org/name", "--engine", "vllm"], ["doctor", "org/name"]):
        assert "no such folder" not in fse_patch(*command, **found).stderr
    # As far as verify gets in an environment without an engine.
    assert "not installed here" in fse_patch("verify", "org/name", "--engine", "vllm", **found).stderr


def test_a_refusal_is_an_object_too(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"model_type": "llama"}, None)
    # An engine is not needed to know that this will never be fused.
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 3
    report = json.loads(done.stdout)
    assert (report["fuse"], report["reason"], report["exit_status"]) == (False, "family.unknown", 3)
    assert done.stderr.startswith("fse-patch: family.unknown: ")


REFUSED = """
import sys
from fse_patch.adapters.patching import guards
guards.engine_version = lambda book, site=None: "0.32.0"
from fse_patch.cli.app import main
sys.argv = ["fse-patch", "verify", sys.argv[1], "--engine", "vllm", "--json"]
main()
"""


def test_a_refusal_by_the_engines_configuration_is_said_alone() -> None:
    logprobs = [[-1.0, -2.0]]
    arm = {
        "dtype": "float32",
        "logprobs": logprobs,
        "rebatched": logprobs,
        "control": logprobs,
        "greedy": [[1]],
        "greedy_best": [[[(1, -0.5)]]],
    }
    refused = [{"role": "main", "reason": "parallel.ep", "detail": "expert parallelism is on"}]
    stock = arm | {"workers": [{"pid": 1, "roles": []}]}
    fused = arm | {"workers": [{"pid": 2, "roles": [], "refused": refused}]}
    job = VerifyJob(Path("m"), (DECISION,), 100, "float32")
    assert judge(job, stock, fused)["failures"] == [
        "main model: refused: parallel.ep: expert parallelism is on"
    ]
    # The control: without a refusal the missing control is said.
    silent = arm | {"workers": [{"pid": 2, "roles": [], "refused": []}]}
    assert "was not seen" in "; ".join(judge(job, stock, silent)["failures"])


@pytest.mark.parametrize(
    ("release", "code"),
    [("0.32.0", "slower.unmeasured"), ("9.9", "version.untested"), ("0.1", "version.untested")],
)
def test_what_an_engine_would_refuse_is_no_yes(release: str, code: str, model: Path) -> None:
    done = fse_patch("plan", model, "--engine", "vllm", "--platform", "rocm", "--engine-version", release)
    assert done.stdout.startswith(f"stock: {code}: ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_a_full_disk_has_a_status_of_its_own(model: Path, as_json: list[str]) -> None:
    command = [sys.executable, "-m", "fse_patch.cli.app", "plan", str(model), "--engine", "vllm", *as_json]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 5
    assert done.stderr == "fse-patch: cannot write the output: No space left on device\n"


def test_a_reader_that_leaves_is_no_error(model: Path) -> None:
    command = [sys.executable, "-m", "fse_patch.cli.app", "plan", str(model), "--engine", "vllm", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(60) in (0, 1, 5)
    assert process.stderr is not None
    assert process.stderr.read() == ""


@pytest.mark.parametrize("name", ["FSEPATCH", "FSE_PATH", "fse_patch", "FSE_PATCH_STRCT"])
def test_a_misspelt_variable_is_seen(name: str) -> None:
    assert settings.origins({name: "1"})[name]["origin"] == "unknown name"


def test_variables_of_others_are_left_alone() -> None:
    assert settings.origins({"FPATH": "1", "PATCH": "1", "PATH": "/bin", "FSEVENTS": "1"}).keys() == (
        settings.DEFAULTS.keys()
    )


def test_a_variable_that_is_unset_says_so() -> None:
    assert settings.origins({})[settings.STRICT] == {"value": "", "origin": "unset"}
    assert settings.origins({settings.STRICT: "1"})[settings.STRICT]["origin"] == "environment"


def test_what_is_meant() -> None:
    assert did_you_mean("VLLM", ["vllm", "sglang"]) == "did you mean vllm?"
    assert did_you_mean("trt", ["vllm", "sglang"]) == "use vllm or sglang"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_ends_a_command_ends_its_engines(number: signal.Signals) -> None:
    # Under nohup one of them is ignored.
    before = signal.signal(number, signal.SIG_DFL)

    def interrupted() -> None:
        with verify.engines_end_with_us():
            os.kill(os.getpid(), number)
            time.sleep(5)

    try:
        with pytest.raises(SystemExit) as ended:
            interrupted()
        assert ended.value.code == 128 + number
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_under_nohup_a_closed_terminal_ends_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with verify.engines_end_with_us():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def in_a_terminal(*command: str, **environment: str) -> str:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "fse_patch.cli.app", *command],
        stdout=slave,
        stderr=slave,
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm", **environment},
    )
    os.close(slave)
    process.wait(60)
    seen = b""
    try:
        while part := os.read(master, 4096):
            seen += part
    except OSError:  # the other end is closed
        pass
    os.close(master)
    return seen.decode()


def test_colours_are_for_terminals(model: Path) -> None:
    command = ["plan", str(model), "--engine", "vllm"]
    assert "\x1b[32m" in in_a_terminal(*command)
    assert "\x1b[32m" not in in_a_terminal(*command, NO_COLOR="1")
    assert "\x1b[" not in fse_patch(*command).stdout


def test_engine_arguments_are_an_object() -> None:
    with pytest.raises(FsePatchError, match="--engine-args"):
        verify.parse_engine_args("[]")
