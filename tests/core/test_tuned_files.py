"""Tables of modes in the repository are what the measurements beside them lead to."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from fse_patch.fusion_core.forward.tuned import Row, Situation, read_table, split_is_stock
from fse_patch.lab import tune
from fse_patch.lab.kept_rows import from_csv

ROOT = Path(__file__).parents[2]
# By table: what a file has of a number of tokens takes the place of what those before it have.
FILES = {
    "patches/tuned/nvidia_h200_vllm.yaml": [
        "block_h200_vllm_0.26.0.csv",
        "block_h200_vllm_0.26.0_routings.csv",
    ],
    "patches/tuned/nvidia_h200_vllm_fp8.yaml": [
        "block_h200_vllm_0.26.0_fp8.csv",
        "block_h200_vllm_0.26.0_fp8_routings.csv",
    ],
    "patches/tuned/nvidia_h200_sglang.yaml": ["block_h200_sglang_0.5.17.csv"],
    "patches/tuned/nvidia_h200_sglang_native.yaml": ["block_h200_sglang_0.5.17.csv"],
}
# Hidden size, width and number of routed experts of what `benchmarks/shapes` names so.
SHAPES = {
    (2048, 512, 512): "qwen3_next_80b",
    (2048, 512, 256): "qwen3.5_35b",
    (4096, 128, 512): "qwen3.5_397b_tp8",
    (4096, 1408, 128): "glm4.5_air",
    (4096, 704, 128): "glm4.5_air_tp2",
    (2048, 1408, 60): "qwen1.5_moe_a2.7b",
}
PLAIN, FP8 = list(FILES)[:2]
SGLANG, NATIVE = list(FILES)[2:]
# Measured, and out of the table: this shape's decode end to end ran with `split` there.
HELD_BACK = {("patches/tuned/nvidia_h200_vllm.yaml", "qwen3_next_80b"): "fused"}
# Tokens up to which `small` was not slower than stock with all tokens alike either, in bfloat16, where it was
# measured apart: SGLang's file has rows of even routing alone; see benchmarks/README.md.
ALIKE = {"qwen3_next_80b": 8, "qwen3.5_35b": 8}
# Under which every row of few tokens was measured, elsewhere.
ROUTINGS = {"even", "zipf", "groups", "alike"}
SHAPES_OF = {
    PLAIN: {*SHAPES.values()},
    FP8: {"qwen3_next_80b", "qwen3.5_35b", "qwen3.5_397b_tp8", "glm4.5_air"},
    SGLANG: {"qwen3.5_35b"},
    NATIVE: {"qwen3_next_80b", "glm4.5_air"},
}


def measured(files: list[str], shape: str) -> list[dict[str, Any]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for file in files:
        with (ROOT / "benchmarks" / file).open(newline="") as source:
            rows = [row for row in csv.DictReader(source) if row["shape"].removesuffix("_text") == shape]
        here = [from_csv(row) for row in rows]
        found |= {
            tokens: [row for row in here if row["tokens"] == tokens]
            for tokens in {row["tokens"] for row in here}
        }
    return [row for rows in found.values() for row in rows]


def shape_of(row: Row) -> str:
    return SHAPES[row.hidden_size, row.width, row.num_routed]


@pytest.mark.parametrize("file", FILES)
def test_a_table_is_what_was_measured(file: str) -> None:
    table = read_table(ROOT / file)
    head = table.model_dump(include=set(tune.HEAD))
    assert {shape_of(row) for row in table.rows} == SHAPES_OF[file]
    for row in table.rows:
        here = Situation(**head, **row.key)
        as_stock = split_is_stock(here, "cuda")
        stored = [step.model_dump() for step in row.steps], row.otherwise
        assert row.gains
        rows = measured(FILES[file], shape_of(row))
        alike = tune.ALONE
        if len(FILES[file]) == 1:
            assert {found["routing"] for found in rows} == {"even"}
            alike = ALIKE.get(shape_of(row), tune.ALONE)
        else:
            few = [found for found in rows if 1 < found["tokens"] <= 64]
            assert {(found["tokens"], found["routing"]) for found in few} == {
                (tokens, routing) for tokens in (2, 4, 8, 16, 32, 64) for routing in ROUTINGS
            }
        if held := HELD_BACK.get((file, shape_of(row))):
            assert tune.steps(rows, as_stock, alike) != stored, "nothing is held back"
            for found in rows:
                found.pop(f"{held}_lower")
        assert tune.steps(rows, as_stock, alike) == stored, shape_of(row)
        assert tune.gains(rows, as_stock, alike) == row.gains, shape_of(row)
        # The control: what runs one token is slower than stock.
        first = min(rows, key=lambda found: int(found["tokens"]))
        first[f"{row.steps[0].mode}_lower"] = 0.9
        assert tune.steps(rows, as_stock, alike) != stored
