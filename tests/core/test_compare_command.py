"""`fse-patch compare`: what is started, and bad input as one line before anything starts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fse_patch.errors import EngineError, FsePatchError, RefusedError
from fse_patch.fusion_core.engines import Bench, facts_of
from fse_patch.lab.compare import client, http, servers
from fse_patch.lab.compare.run import FUSED, state_of
from fse_patch.launch.command import parts_of

from .test_cli_plan import fse_patch, sound
from .test_status import FUSED as IS_FUSED
from .test_status import REFUSED, server

ON_LOOPBACK = ["--host", "127.0.0.1", "--port", "7"]


@pytest.mark.parametrize(
    ("engine", "words", "stock", "fused"),
    [
        ("vllm", "A=1 nice vllm serve M --tp 2", "nice vllm serve M --tp 2", "nice vllm serve M --tp 2"),
        (
            "vllm",
            "python -m vllm.entrypoints.openai.api_server --model M",
            "python -m vllm.entrypoints.openai.api_server --model M",
            "python -m vllm.entrypoints.openai.api_server --model M",
        ),
        (
            "sglang",
            "python3 -m sglang.launch_server --model-path M",
            "python3 -m sglang.launch_server --model-path M",
            "python3 -m fse_patch.launch_sglang --model-path M",
        ),
        (
            "sglang",
            "python3 -m fse_patch.launch_sglang --model-path M",
            "python3 -m sglang.launch_server --model-path M",
            "python3 -m fse_patch.launch_sglang --model-path M",
        ),
        (
            "sglang",
            "/x/sglang serve --model-path M",
            "/x/sglang serve --model-path M",
            f"{sys.executable} -m fse_patch.launch_sglang --model-path M",
        ),
    ],
)
def test_the_commands_of_both_servers(engine: str, words: str, stock: str, fused: str) -> None:
    for patched, expected in ((False, stock), (True, fused)):
        assert servers.launch_words(engine, words.split(), patched, 7) == [*expected.split(), *ON_LOOPBACK]


def test_the_last_host_and_port_count() -> None:
    words = ["vllm", "serve", "M", "--host", "0.0.0.0", "--port", "8000"]
    assert servers.launch_words("vllm", words, False, 7)[-4:] == ON_LOOPBACK


def test_a_command_that_launches_nothing() -> None:
    with pytest.raises(FsePatchError, match="no launch command of vllm"):
        parts_of("vllm", ["python", "-m", "sglang.launch_server"])


def test_the_environment_differs_in_one_variable() -> None:
    around = {"PATH": "/bin", "FSE_PATCH": "1", "HF_HUB_OFFLINE": "0"}
    words = ["FSE_PATCH=vllm", "FSE_PATCH_VERIFY=all", "vllm", "serve", "M"]
    stock, fused = (servers.environment_of("vllm", words, patched, around) for patched in (False, True))
    assert (stock.pop("FSE_PATCH"), fused.pop("FSE_PATCH")) == ("0", "vllm")
    assert stock == fused
    assert stock["PATH"].split(":")[0] == str(Path(sys.executable).parent)
    assert (stock["FSE_PATCH_VERIFY"], stock["HF_HUB_OFFLINE"]) == ("all", "0")
    assert "fse_patch" in stock["VLLM_PLUGINS"].split(",")
    assert stock["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] == "600"
    # What the user has said of plugins stays, and of waiting.
    patient = servers.environment_of("vllm", ["VLLM_HTTP_TIMEOUT_KEEP_ALIVE=7", *words], True, around)
    assert patient["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] == "7"
    own = servers.environment_of("vllm", ["VLLM_PLUGINS=other", *words], True, around)
    assert own["VLLM_PLUGINS"] == "other"
    assert "SGLANG_PLUGINS" not in servers.environment_of("sglang", SGLANG, True, around)


SGLANG = ["python", "-m", "sglang.launch_server"]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_the_command_of_the_client(engine: str) -> None:
    launch = facts_of(engine).launch
    assert launch is not None
    assert launch.bench is not None
    given = {"input": 512, "output": 128, "requests": 16, "streams": 2, "seed": 2}
    place = {"url": "http://h:1", "checkpoint": "/a b", "folder": "/f", "file": "2.json"}
    words = client.words_of(launch.bench, model="m", **given, **place)
    assert words[words.index("--model") + 1] == "/a b"
    assert words[words.index("--num-prompts") + 1] == "16"
    assert words[words.index("--max-concurrency") + 1] == "2"
    assert not any("{" in word for word in words)
    assert client.environment("k", {"FSE_PATCH": "1"}) == {**servers.QUIET, "OPENAI_API_KEY": "k"}


def test_a_client_that_cannot_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(FsePatchError, match=r"vllm bench client: ended with status 1: .*No module named"):
        client.try_out("vllm", Bench(file="-", words="-m fse_patch_has_no_such_module --url {url}"), tmp_path)
    client.try_out("vllm", Bench(file="-", words="-m json.tool --indent 2"), tmp_path)


def running(url: str, log: str = "", ours: bool = True) -> servers.Running:
    return servers.Running(url, lambda: None, lambda: log, 1.0 if ours else None)


def asked(url: str) -> list[dict[str, object]]:
    from fse_patch.cli import status

    return [{**rank, "line": status.line(rank)} for rank in status.ask(url, "", 5)]


def test_the_state_of_a_server_is_what_it_says() -> None:
    with server({"/fse_patch/status": {"ranks": [IS_FUSED, {**IS_FUSED, "rank": 1}]}}) as url:
        fused, said = state_of(FUSED, running(url), asked)
        assert (fused, len(said)) == (True, 2)
        with pytest.raises(FsePatchError, match="the stock server is fused: rank 0, main model"):
            state_of("stock", running(url), asked)
    with server({"/fse_patch/status": {"ranks": [IS_FUSED, REFUSED]}}) as url:
        with pytest.raises(RefusedError, match="expert parallelism is on") as refused:
            state_of(FUSED, running(url), asked)
        assert refused.value.reason == "parallel.ep"


def test_a_silent_server_is_known_by_its_log() -> None:
    line = "[fse_patch 7] vllm, main model: shared expert fused: 2 layers"
    with server({}) as url:
        assert state_of(FUSED, running(url, f"a\n{line}\n"), asked) == (True, [line])
        assert state_of("stock", running(url, "a\n"), asked) == (False, ["started without fse_patch"])
        with pytest.raises(RefusedError, match="its log has no line"):
            state_of(FUSED, running(url, "a\n"), asked)
        # One that we did not start may be anything.
        assert state_of(FUSED, running(url, ours=False), asked) == (None, ["it does not say"])


def test_a_server_that_runs_already_is_looked_after() -> None:
    with server({"/health": {}}) as url, servers.given("stock", url) as one:
        one.check()
        assert (one.url, one.start_seconds) == (url, None)
    with pytest.raises(EngineError, match=r"stock server: .* does not answer"):
        one.check()


def test_what_a_server_serves() -> None:
    with server({"/v1/models": {"data": [{"id": "m", "owned_by": "vllm"}]}}) as url:
        assert http.model_of(url, "")["id"] == "m"
        with pytest.raises(FsePatchError, match="status 501"):
            http.ask(url, "/v1/completions", "", {})
    with server({"/v1/models": {"data": []}}) as url, pytest.raises(FsePatchError, match="serves no model"):
        http.model_of(url, "")
    with server({"/v1/models": {}}, key="k") as url, pytest.raises(FsePatchError, match="give --api-key"):
        http.model_of(url, "")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 2, "give the command that starts the server"),
        (["--stock", "http://127.0.0.1:1"], 2, "give the command that starts the server"),
        (["--stock", "a", "--fused", "b", "--", "vllm", "serve", "MODEL"], 2, "give the command"),
        (["--stock", "127.0.0.1:1", "--fused", "127.0.0.1:1"], 4, "no answer"),
        (["--", "nonsense"], 2, "no launch command that is known"),
        (["--", "vllm", "serve", "other"], 2, "serves 'other'"),
        (["--", "vllm", "serve"], 2, "names no model"),
        (["--", "vllm", "serve", "MODEL", "--nothing"], 2, "no flag of vllm"),
        (["--concurrency", "1,x", "--", "vllm", "serve", "MODEL"], 2, "--concurrency '1,x'"),
        (["--out", "MODEL", "--", "vllm", "serve", "MODEL"], 2, "is there already"),
        (["--rounds", "0", "--", "vllm", "serve", "MODEL"], 2, "--rounds"),
        # The environment of these tests has no engine.
        (["--", "vllm", "serve", "MODEL"], 2, "vllm is not installed here"),
        (["--", *SGLANG, "--model-path", "MODEL"], 2, "sglang is not installed here"),
    ],
)
def test_bad_input_is_a_line(tmp_path: Path, arguments: list[str], status: int, words: str) -> None:
    model = str(sound(tmp_path / "m"))
    done = fse_patch("compare", model, *(model if word == "MODEL" else word for word in arguments))
    assert (done.returncode, done.stderr.count("\n")) == (status, 1)
    assert words in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_a_checkpoint_that_is_not_there() -> None:
    done = fse_patch("compare", "/nowhere", "--", "vllm", "serve", "/nowhere")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
