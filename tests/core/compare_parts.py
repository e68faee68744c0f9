"""A server with the pages that a comparison asks for, and its client; both start fast, with nothing of ours.

    python compare_parts.py serve PORT stock|fused OUT FAULT      client FILE REQUESTS OUT FAULT

Both have a child that SIGTERM does not end, as processes of an engine may.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
RANK = {"rank": 0, "engine": "vllm", "engine_version": "1"}
KEPT = ("output_throughput", "request_throughput", "median_ttft_ms", "median_tpot_ms", "duration")
ROLE = {"role": "main", "fused_layers": [0], "canary": {"state": "passed"}}


def with_a_deaf_child(mark: str) -> None:
    subprocess.Popen([sys.executable, "-c", DEAF, mark])


def serve(port: int, fused: bool, fault: str) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state = {**RANK, "roles": [ROLE]} if fused else {**RANK, "on": False, "reason": "off"}
            pages = {"/v1/models": {"data": [{"id": "m", "owned_by": "vllm", "max_model_len": 90}]}}
            self.answer({**pages, "/fse_patch/status": {"ranks": [state]}}.get(self.path, {}))

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            shift = 0.5 if fused and fault == "wrong" else 0.0
            choices = [
                {
                    "index": n,
                    "logprobs": {"token_logprobs": [None, *(t * -0.01 - shift for t in prompt[1:]), -1]},
                }
                for n, prompt in enumerate(asked["prompt"])
            ]
            self.answer({"choices": choices})

        def answer(self, data: Any) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(data).encode())

        def log_message(self, *args: object) -> None: ...

    if fault == "no-start":
        raise OSError("no memory is left")
    time.sleep(0.15)
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


def measure(file: Path, requests: int, fault: str) -> None:
    time.sleep(0.15)
    if fault == "client":
        raise ModuleNotFoundError("No module named 'datasets'")
    file.write_text(json.dumps({"completed": requests, **dict.fromkeys(KEPT, 10.0)}))


if __name__ == "__main__":
    if sys.argv[2:] == ["--help"]:
        sys.exit(0)
    what, first, second, out, fault = sys.argv[1:]
    with_a_deaf_child(out)
    if what == "serve":
        serve(int(first), second == "fused", fault)
    else:
        measure(Path(first), int(second), fault)
