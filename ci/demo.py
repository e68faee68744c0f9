"""The main job in one command: tiny models of the four families, stock against fused, on the real engines.

    python3 ci/demo.py [ENGINE ...]      vllm, sglang; default: both

Builds the engines' environments, runs one engine after the other in its own (ci/demo_engine.py), and prints
one table (ci/demo_table.py). Exit status 1 if a row does not pass, 2 for an unknown engine. Needs a Python
with venv and pip, and nothing else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from environment import ROOT, VENVS, say
from envs import build, matrix
from testing import LOGS, end

HERE = Path(__file__).resolve().parent
# Seconds for an engine with all its models, many times what a run takes.
LIMIT = 1800
LOG_LINES = 40
Row = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """One row: a family, the checkpoint that stands for it, and how the engine runs it."""

    family: str
    recipe: str
    dtype: str = "float32"
    engine_args: dict[str, Any] = field(default_factory=dict)


# vLLM's linear attention has no float32 kernel on a CPU: those two run there as they are served.
LINEAR = {"mamba_ssm_cache_dtype": "float32"}
MODELS = {
    "vllm": [
        Model("Qwen2-MoE", "qwen2_moe_wide4"),
        Model("Qwen3-Next", "qwen3_next", "bfloat16", LINEAR),
        Model("Qwen3.5", "qwen3_5_vl_3d", "bfloat16", {**LINEAR, "language_model_only": True}),
        Model("GLM-4", "glm4_moe_scale"),
    ],
    "sglang": [
        Model("Qwen2-MoE", "qwen2_moe_wide4"),
        Model("Qwen3-Next", "qwen3_next"),
        Model("Qwen3.5", "qwen3_5_vl_3d", engine_args={"enable_multimodal": False}),
        Model("GLM-4", "glm4_moe_scale"),
    ],
}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    # One process for each arm; the cache saves the engine's inspection of model classes the next time.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CACHE_ROOT": str(ROOT / ".cache" / "demo"),
}


def run(command: list[str], log: Path, limit: float = LIMIT) -> str:
    """Run an engine's models and say the lines that it prints; returns what went wrong, or nothing."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as sink:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=sink,
            stdin=subprocess.DEVNULL,
            env=os.environ | ENVIRONMENT,
            start_new_session=True,
        )
    late = threading.Event()

    def stop() -> None:
        late.set()
        end(process)

    timer = threading.Timer(limit, stop)
    timer.start()
    try:
        assert process.stdout
        for line in process.stdout:
            say(line.decode(errors="replace"))
        status = process.wait()
    except BaseException:
        end(process)
        raise
    finally:
        timer.cancel()
    if late.is_set():
        return f"ended after its limit of {limit:.0f} s"
    return f"ended with status {status}" if status else ""


def rows(engine: str, command: list[str], result: Path, log: Path, limit: float = LIMIT) -> list[Row]:
    """Return the table's rows of one engine. Where it did not get to its end, none of them passed."""
    failure = run([*command, engine, str(result.parent), str(result)], log, limit)
    head = [{"engine": engine, "family": m.family, "dtype": m.dtype} for m in MODELS[engine]]
    if not failure:
        return [{**h, **report} for h, report in zip(head, json.loads(result.read_text()), strict=True)]
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
    missing = [{**h, "passed": False, "failures": []} for h in head]
    return [{**missing[0], "failures": [failure], "log": tail}, *missing[1:]]


def main(engines: list[str]) -> int:
    """Run the demo; returns its exit status."""
    for engine in engines:
        if engine not in MODELS:
            print(f"demo: no engine {engine!r}; there are {', '.join(MODELS)}", file=sys.stderr)
            return 2
    spec = matrix()
    shown = {r["engine"]: r for r in spec["engines"] if r.get("demo") and r["engine"] in (engines or MODELS)}
    names = [row["name"] for row in shown.values()]
    if build(names, spec):
        return 1
    table: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="fse_patch_demo_") as folder:
        for engine, row in shown.items():
            name = row["name"]
            say(f"{name}: starting\n")
            command = [str(VENVS / name / "bin" / "python"), str(HERE / "demo_engine.py")]
            ended = rows(engine, command, Path(folder) / f"{engine}.json", LOGS / f"demo-{name}.log")
            table += [{"version": row["version"], **r} for r in ended]
    # An engine's environment has what the table is drawn with; this Python may not.
    python = VENVS / names[0] / "bin" / "python"
    drawn = subprocess.run([python, HERE / "demo_table.py"], input=json.dumps(table), text=True)
    return 0 if drawn.returncode == 0 and all(r["passed"] for r in table) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
