"""Formats of experts that vLLM's layers run in several modes, and how weights get into measured blocks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fse_patch.adapters.vllm.formats import FP8, format_of
from fse_patch.errors import FsePatchError
from fse_patch.lab.random_weights import as_slots
from fse_patch.lab.vllm.quant_folder import QUANTISATIONS, quantised_folder

from .moe import stored_as


def config(name: str = "fp8", block: list[int] | None = None, scheme: str = "dynamic", parts: int = 1) -> Any:
    quant = SimpleNamespace(get_name=lambda: name, weight_block_size=block, activation_scheme=scheme)
    return SimpleNamespace(quant_config=quant, parallel_config=SimpleNamespace(tensor_parallel_size=parts))


def of_width(width: int, formats: tuple[str, ...] = ("fp8-block",)) -> Any:
    """A decision on FP8 experts of a width."""
    decided = stored_as("fp8", formats)
    layout = replace(decided.moe.layout, moe_intermediate_size=width)
    return replace(decided, moe=replace(decided.moe, layout=layout))


@pytest.mark.parametrize(
    ("width", "parts", "known"), [(512, 1, True), (512, 4, True), (512, 8, False), (192, 1, False)]
)
def test_blocks_that_vllm_would_cut_smaller_run_in_one_mode(width: int, parts: int, known: bool) -> None:
    assert (format_of(of_width(width), config(block=[128, 128], parts=parts)) is not None) == known
    # The control: without blocks there is nothing to cut.
    assert format_of(of_width(width, ("fp8-tensor",)), config(parts=parts)) is not None


def test_formats_have_a_word_for_tables() -> None:
    plain = format_of(stored_as("none", ("plain",)), SimpleNamespace(quant_config=None))
    assert plain is not None
    assert (plain.quant, plain.scale, plain.block) == ("none", "", None)
    block = format_of(of_width(256), config(block=[128, 64]))
    assert block is not None
    assert (block.quant, block.scale, block.block) == ("fp8-block 128x64", "weight_scale_inv", (128, 64))
    tensor = format_of(stored_as("fp8", ("fp8-tensor",)), config(scheme="static"))
    assert tensor is not None
    assert (tensor.quant, tensor.scale, tensor.block) == ("fp8-tensor static", "weight_scale", None)


@pytest.mark.parametrize(
    ("method", "formats", "name"),
    [
        ("fp8", ("fp8-channel",), "fp8"),
        ("fp8", ("fp8-block", "plain"), "fp8"),
        ("fp8", ("fp8-block",), "modelopt"),
        ("compressed-tensors", ("fp8-block",), "compressed-tensors"),
    ],
)
def test_other_formats_run_in_one_mode(method: str, formats: tuple[str, ...], name: str) -> None:
    assert format_of(stored_as(method, formats), config(name, [128, 128])) is None


@pytest.mark.parametrize("slots", [1, 2])
def test_a_dense_layer_as_slots(slots: int) -> None:
    width, hidden = 6, 5
    gate, up = torch.randn(slots * width, hidden), torch.randn(slots * width, hidden)
    down = torch.randn(hidden, slots * width)
    w13, w2 = as_slots(torch.cat([gate, up]), "w13", slots), as_slots(down, "w2", slots)
    for slot in range(slots):
        rows = slice(slot * width, (slot + 1) * width)
        assert torch.equal(w13[slot], torch.cat([gate[rows], up[rows]]))
        assert torch.equal(w2[slot], down[:, rows])
    # One scale for each matrix, or for each half of the first.
    assert as_slots(torch.tensor([2.0, 3.0]), "w13", slots).tolist() == [[2.0, 3.0]] * slots
    assert as_slots(torch.tensor([4.0]), "w2", slots).tolist() == [4.0] * slots


def test_a_folder_that_declares_a_quantisation(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x"}))
    with quantised_folder(tmp_path, "") as same:
        assert same == tmp_path
    for quant in QUANTISATIONS:
        assert quant in FP8
        with quantised_folder(tmp_path, quant) as folder:
            found = json.loads((folder / "config.json").read_text())
        assert found == {"model_type": "x", "quantization_config": QUANTISATIONS[quant]}
    with pytest.raises(FsePatchError, match="fp9"), quantised_folder(tmp_path, "fp9"):
        pass
