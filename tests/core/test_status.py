"""`fse-patch status --url`: what a running server says, and what is said where it says nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from .test_cli_plan import fse_patch

ROLE = {
    "engine": "vllm",
    "role": "main",
    "built_layers": [0, 1, 2],
    "fused_layers": [0, 1, 2],
    "canary": {"state": "passed"},
    "modes": "small up to 8, split beyond",
}
FUSED = {
    "rank": 0,
    "engine": "vllm",
    "engine_version": "0.32.0",
    "since": 1700000000.0,
    "roles": [ROLE],
    "decisions": [],
}
REFUSED = {
    "rank": 1,
    "engine": "vllm",
    "engine_version": "0.32.0",
    "since": 1700000000.0,
    "roles": [],
    "decisions": [
        {"role": "main", "fuse": False, "reason": "parallel.ep", "detail": "expert parallelism is on"}
    ],
}
METRICS = """# HELP fse_patch_decisions_total Decisions
fse_patch_decisions_total{engine="vllm",family="qwen2_moe",fused="true",reason="ok",layout="%s"} 1.0
fse_patch_paired_threshold{engine="vllm",role="main"} %s
"""
LOADED = {"threshold": 16, "reason": "", "detail": "", "proof": {"state": "passed"}}
PAIRED = "fused, paired, layers 0-2"
APART = {"engine": "vllm", "role": "main", "weight_layout": "paired", "built_layers": [0, 1, 2]}


@contextmanager
def server(pages: dict[str, Any], key: str = "") -> Iterator[str]:
    """A server on loopback that has these pages, and no others."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if key and self.headers.get("Authorization") != f"Bearer {key}":
                self.send_response(401)
                self.end_headers()
                return
            page = pages.get(self.path)
            self.send_response(404 if page is None else 200)
            self.end_headers()
            if page is not None:
                self.wfile.write((page if isinstance(page, str) else json.dumps(page)).encode())

        def log_message(self, *args: object) -> None: ...

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        http.server_close()


def test_a_line_for_each_rank() -> None:
    with server({"/fse_patch/status": {"ranks": [FUSED, {**FUSED, "rank": 1}]}}) as url:
        done = fse_patch("status", "--url", url)
        assert done.returncode == 0, done.stderr
        first, second = done.stdout.splitlines()
        assert first.startswith(
            "rank 0, main model of vllm 0.32.0: fused, merged, layers 0-2, modes small up to 8"
        )
        assert "proof passed, since 2023-11-14" in first
        assert second.startswith("rank 1, ")
        report = json.loads(fse_patch("status", "--url", url, "--json").stdout)
    assert report["fused"] is True
    assert report["ranks"][0]["layers"] == [0, 1, 2]


def test_one_rank_that_is_not_fused_is_a_refusal() -> None:
    with server({"/fse_patch/status": {"ranks": [FUSED, REFUSED]}}) as url:
        done = fse_patch("status", "--url", url.removeprefix("http://"))
    assert done.returncode == 3
    assert "rank 1, main model of vllm 0.32.0: stock: parallel.ep: expert parallelism is on" in done.stdout


def test_sglang_says_it_in_its_server_info() -> None:
    state = {**FUSED, "engine": "sglang", "engine_version": "0.5.20"}
    with server({"/server_info": {"internal_states": [{"fse_patch": state}], "version": "0.5.20"}}) as url:
        done = fse_patch("status", "--url", url)
    assert done.returncode == 0
    assert "main model of sglang 0.5.20: fused, merged" in done.stdout


def test_the_lm_head_is_named() -> None:
    on = {"format": "int8:g32", "threshold": 8, "reason": ""}
    off = {"format": "int8:g32", "threshold": 0, "reason": "head.proof"}
    ranks = [{**FUSED, "lm_heads": [on]}, {**REFUSED, "lm_heads": [off]}, {**FUSED, "lm_heads": []}]
    with server({"/fse_patch/status": {"ranks": ranks}}) as url:
        lines = fse_patch("status", "--url", url).stdout.splitlines()
        told = json.loads(fse_patch("status", "--url", url, "--json").stdout)
    assert [line.partition("; ")[2] for line in lines] == [
        "LM head int8:g32 up to 8 tokens",
        "LM head stock: head.proof",
        "",
    ]
    assert [rank["lm_head"] for rank in told["ranks"]] == [on, off, None]


@pytest.mark.parametrize(
    ("loaded", "status", "said"),
    [
        (
            LOADED,
            0,
            "fused, paired, layers 0-2, modes paired up to 16, the engine's own beyond, proof passed",
        ),
        (None, 0, "fused, paired, layers 0-2, proof not_loaded"),
        ({**LOADED, "threshold": 0, "reason": "proof.failed", "detail": "d"}, 3, "stock: proof.failed: d"),
    ],
)
def test_paired_layers_say_up_to_how_many_tokens(loaded: Any, status: int, said: str) -> None:
    role = APART if loaded is None else {**APART, "paired": loaded}
    with server({"/fse_patch/status": {"ranks": [{**FUSED, "roles": [role]}]}}) as url:
        done = fse_patch("status", "--url", url)
    assert done.returncode == status
    assert done.stdout.startswith(f"rank 0, main model of vllm 0.32.0: {said}")


@pytest.mark.parametrize(
    ("layout", "threshold", "status", "said"),
    [
        ("merged", 0.0, 0, "fused, merged"),
        ("paired", 16.0, 0, "fused, paired"),
        ("paired", 0.0, 3, "stock: the engine's own forward runs; its log says why"),
    ],
)
def test_metrics_say_less(layout: str, threshold: float, status: int, said: str) -> None:
    with server({"/metrics": METRICS % (layout, threshold)}) as url:
        done = fse_patch("status", "--url", url)
    assert (done.returncode, done.stdout) == (status, f"any model of vllm: {said}\n")


def test_a_server_that_says_nothing() -> None:
    for pages in (
        {},
        {"/metrics": "vllm:x 1\n", "/server_info": {"internal_states": [{}]}},
        {"/server_info": "[1"},
    ):
        with server(pages) as url:
            done = fse_patch("status", "--url", url)
        assert done.returncode == 2
        assert "VLLM_PLUGINS=fse_patch" in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_server_that_wants_a_key() -> None:
    pages = {"/fse_patch/status": {"ranks": [FUSED]}}
    with server(pages, key="secret") as url:
        assert "give --api-key" in fse_patch("status", "--url", url).stderr
        assert fse_patch("status", "--url", url, "--api-key", "secret").returncode == 0


def test_no_server_is_one_line(tmp_path: Path) -> None:
    for url in ("http://127.0.0.1:1", "http://:bad", "ftp://x"):
        done = fse_patch("status", "--url", url, "--json")
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "no answer" in json.loads(done.stdout)["error"]
