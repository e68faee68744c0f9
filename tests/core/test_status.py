"""`fse-patch status --url`: what a running server says, and what is said where it says nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

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
fse_patch_decisions_total{engine="vllm",family="qwen2_moe",fused="true",reason="ok"} 1.0
"""


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


def test_metrics_say_less() -> None:
    with server({"/metrics": METRICS}) as url:
        done = fse_patch("status", "--url", url)
    assert (done.returncode, done.stdout) == (0, "any model of vllm: fused\n")


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
