"""The demo around the engines: what it shows where one of them fails."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path

import demo
import demo_table
import pytest
from rich.console import Console

PASSED = {
    "passed": True,
    "failures": [],
    "fused_layers": [0, 1, 2, 3],
    "moe_layers": 4,
    "slots_loaded": 16,
    "mean_abs_logprob_diff": 1.25e-6,
    "stock_noise": 0.0,
    "control_diff": 3.1e-3,
    "replaced_operations": [],
}


def shown(rows: list[demo.Row]) -> str:
    out = io.StringIO()
    demo_table.draw([{"version": "1.2.3", **row} for row in rows], Console(file=out, width=80))
    return out.getvalue()


def rows_of(tmp_path: Path, engine: str, code: str, limit: float = 60) -> list[demo.Row]:
    script = tmp_path / "engine.py"
    script.write_text(f"import pathlib, sys, time\n{code}")
    return demo.rows(engine, [sys.executable, str(script)], tmp_path / "result", tmp_path / "log", limit)


def passing(tmp_path: Path, engine: str, **changes: object) -> list[demo.Row]:
    (tmp_path / "reports").write_text(json.dumps([PASSED | changes] * len(demo.MODELS[engine])))
    return rows_of(tmp_path, engine, "pathlib.Path(sys.argv[2], 'reports').rename(sys.argv[3])")


def test_both_engines_in_one_table(tmp_path):
    rows = passing(tmp_path, "vllm") + passing(tmp_path, "sglang", replaced_operations=["conv"])
    text = shown(rows)
    assert "vLLM 1.2.3, SGLang 1.2.3" in text
    assert text.count(" equal") == 8
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert "SGLang Qwen2-MoE, Qwen3-Next, Qwen3.5, GLM-4: linear attention ran through\n" in text
    assert "vLLM Q" not in text


def test_an_engine_that_crashes_does_not_hide_the_other(tmp_path, capsys):
    code = "print('loading', flush=True)\nprint('the cause', file=sys.stderr)\nsys.exit(3)"
    text = shown(rows_of(tmp_path, "vllm", code) + passing(tmp_path, "sglang"))
    assert "loading" in capsys.readouterr().out
    assert (text.count("FAILED"), text.count(" equal")) == (4, 4)
    assert "vLLM Qwen2-MoE: ended with status 3" in text
    assert "the cause" in text


def test_an_engine_that_hangs_is_ended(tmp_path):
    begun = time.monotonic()
    rows = rows_of(tmp_path, "sglang", "time.sleep(60)", limit=1)
    assert time.monotonic() - begun < 15
    assert not any(row["passed"] for row in rows)
    assert "limit of 1 s" in shown(rows)


def test_a_row_that_differs_says_why(tmp_path):
    rows = passing(tmp_path, "vllm", passed=False, failures=["log-probabilities differ"])
    assert "vLLM GLM-4: log-probabilities differ" in shown(rows)
    assert " equal" not in shown(rows)


def test_an_unknown_engine(capsys):
    assert demo.main(["vlm"]) == 2
    assert capsys.readouterr().err == "demo: no engine 'vlm'; there are vllm, sglang\n"


@pytest.mark.parametrize("engine", demo.MODELS)
def test_one_release_of_each_engine_is_shown(engine):
    assert len([r for r in demo.matrix()["engines"] if r["engine"] == engine and r.get("demo")]) == 1
