"""A launch command is read as the engine reads it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.engines import Refusal, facts_of
from fse_patch.fusion_core.reasons import REASONS
from fse_patch.launch import flags
from fse_patch.launch.command import Asked, engine_of_command, read
from fse_patch.patches import ENGINES


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
        ("vllm serve M -tp 0", "", "--tensor-parallel-size 0: give 1 or more"),
        ("python -m sglang.launch_server --model M --ep-size -1", "", "--ep-size -1: give 1 or more"),
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


def test_engine_arguments_are_checked_by_name() -> None:
    flags.check_arguments("vllm", "0.32.0", ["tensor_parallel_size", "dtype"])
    flags.check_arguments("vllm", "0.99.0", ["an_argument_of_tomorrow"])
    with pytest.raises(FsePatchError, match=r"'tensor_paralel_size'; did you mean tensor_parallel"):
        flags.check_arguments("vllm", "0.32.0+cpu", ["tensor_paralel_size"])
