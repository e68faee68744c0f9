"""What is said where no engine is: arguments first, then the environment that has one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fse_patch.cli import ending

from .checkpoints import config_of, model_tensors, write_checkpoint
from .test_cli_plan import assert_one_line

ROOT = Path(__file__).parents[2]
# What comes with an engine alone cannot be imported.
WITHOUT_AN_ENGINE = """
import sys
from fse_patch.cli.ending import NEEDED
sys.modules.update(dict.fromkeys(NEEDED))
from fse_patch.cli.app import main
main()
"""
TUNE = ["tune", "{model}", "--out", "{tmp}/table.yaml"]
VERIFY = ["verify", "{model}", "--engine", "vllm"]
SAID_WITHOUT_AN_ENGINE = [
    (["bench", "{model}"], "install fse-patch into vllm's environment"),
    (["bench", "{model}", "--tokens", "x"], "--tokens 'x'"),
    (["bench", "{model}", "--end-to-end", "--streams", "x"], "--streams 'x'"),
    (TUNE, "install fse-patch into vllm's environment"),
    ([*TUNE, "--tokens", "x"], "--tokens 'x'"),
    (VERIFY, "install fse-patch into the engine's own environment"),
    ([*VERIFY, "--timeout", "-5"], "invalid value for '--timeout'"),
    ([*VERIFY, "--dtype", "fp16"], "did you mean float16?"),
    (["compare", "{model}"], "give the command that starts the server"),
    (["compare", "{model}", "--", "vllm", "serve", "{model}"], "vllm is not installed here"),
    (["profile", "{model}", "--engine", "vllm", "--arm", "x"], "--arm x: use both, stock, ours"),
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", config_of("glm4_moe"), model_tensors("glm4_moe"))


@pytest.mark.parametrize(
    ("arguments", "words"), SAID_WITHOUT_AN_ENGINE, ids=[" ".join(a) for a, _ in SAID_WITHOUT_AN_ENGINE]
)
def test_without_an_engine_arguments_are_checked_and_its_environment_is_named(
    arguments: list[str], words: str, model: Path
) -> None:
    given = [word.format(model=model, tmp=model.parent) for word in arguments]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_AN_ENGINE, *given], capture_output=True, text=True, cwd=ROOT
    )
    assert_one_line(done, words)


def test_launch_sglang_without_sglang_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fse_patch.launch_sglang", "--model-path", "x"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "install fse-patch into SGLang's own environment" in done.stderr


def test_a_module_of_an_engine_that_is_missing_is_no_internal_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command(*args: object, **kwargs: object) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    def broken(*args: object, **kwargs: object) -> None:
        raise ModuleNotFoundError("No module named 'fse_patch.gone'", name="fse_patch.gone")

    for raising, status, words in (
        (command, 2, "torch is not installed here"),
        (broken, 70, "internal error"),
    ):
        with pytest.raises(SystemExit) as ended:
            ending.run(raising, [])
        assert ended.value.code == status
        assert words in capsys.readouterr().err
