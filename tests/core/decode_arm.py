"""A scripted arm of an end-to-end measurement: speaks its protocol, takes known times, holds no engine.

    python -m tests.core.decode_arm REQUEST.json

The script is in the request's engine_args: ``ms`` a step of each arm and ``prompt`` (seconds), and for one
``arm`` a ``fault``. With ``steps`` it tells when steps ended. Every question is noted in ``notes``, a file;
when an arm came and was ready in ``came``, where that is given.
"""

from __future__ import annotations

import json
import os
import sys
import time
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

LAYERS = [0, 1]


def ready(asked: dict[str, Any], fault: str) -> dict[str, Any]:
    assert os.environ["FSE_PATCH"] == ("vllm" if asked["name"] == "fused" else "0")
    fused = (asked["name"] == "fused") != (fault == "wrong state")
    role = {"role": "main", "built_layers": LAYERS[: 1 if fault == "half" else None], "fused_layers": LAYERS}
    return {
        "start_seconds": 1.0,
        "versions": {"fse_patch": "0", "vllm": "0"},
        "device": "none",
        "roles": [role] if fused else [],
        "refused": [] if fused else [{"reason": "slower.unmeasured", "detail": "no table"}],
    }


def main(request: Path) -> None:
    asked = json.loads(request.read_text())
    script, name = asked["engine_args"], asked["name"]
    fault = script.get("fault", "") if script.get("arm") == name else ""
    with Client(asked["address"], "AF_UNIX", authkey=bytes.fromhex(asked["authkey"])) as parent:
        came = time.monotonic()
        parent.send(name)
        state = ready(asked, fault)
        if "came" in script:
            time.sleep(0.5)
            with Path(script["came"]).open("a") as file:
                print(json.dumps([name, came, time.monotonic()]), file=file)
        parent.send(state)
        asked_for = 0
        while (question := parent.recv())["do"] != "end":
            with Path(script["notes"]).open("a") as notes:
                print(json.dumps({"arm": name, "pid": os.getpid(), **question}), file=notes)
            if question["do"] == "report":
                parent.send(state)
                continue
            asked_for += 1
            if fault == "dies" and asked_for == 6:
                print("the last words", flush=True)
                sys.exit(7)
            if fault == "fails" and asked_for == 6:
                print("a traceback", flush=True)
                parent.send({"error": "RuntimeError: out of memory"})
                return
            if fault == "silent":
                time.sleep(600)
            time.sleep(script.get("pause", 0))
            step = script["ms"][name] / 1e3 * question["streams"]
            seconds = script["prompt"] + step * question["tokens"]
            if asked_for % 3 == 0:
                seconds += script.get("hiccup", 0.0)
            parent.send(
                {
                    "seconds": seconds,
                    "tail": step * question["tail"] if script.get("steps") else None,
                    "held_up": script.get("hiccup", 0.0),
                    "different_tokens": question["streams"],
                }
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
