"""The test material itself: an order that does not change, or a hole that is no hole, would test nothing."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import weights
from checkpoints.headers import huge_headers
from checkpoints.permute import ORDERS, permute
from checkpoints.raw import read_raw, write_raw
from checkpoints.recipes import RECIPES


def _checkpoint(folder: Path, stacked: bool) -> Path:
    names = ["model.embed_tokens.weight", "lm_head.weight", "mtp.fc.weight"]
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp."
        names += [f"{prefix}gate.weight", f"{prefix}shared_expert_gate.weight"]
        names += [f"{prefix}shared_expert.{p}_proj.weight" for p in ("gate", "up", "down")]
        if stacked:
            names += [f"{prefix}experts.gate_up_proj", f"{prefix}experts.down_proj"]
        else:
            names += [
                f"{prefix}experts.{e}.{p}_proj.weight" for e in range(4) for p in ("gate", "up", "down")
            ]
    folder.mkdir()
    write_raw(
        folder / "model.safetensors", {n: ("F32", [2], bytes([i] * 8)) for i, n in enumerate(sorted(names))}
    )
    (folder / "config.json").write_text("{}")
    return folder


def _order(folder: Path, layer: int) -> str:
    """The layer's expert tensors as a loader meets them: files by name, then tensors by name."""
    out = ""
    for file in sorted(folder.glob("*.safetensors")):
        for name in sorted(read_raw(file)):
            if match := re.match(rf"model\.layers\.{layer}\.mlp\.(experts|shared_expert)\.", name):
                out += "s" if match[1] == "shared_expert" else "r"
    return out


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("shards", [3, 4, 5])
@pytest.mark.parametrize("order", ORDERS)
def test_permuted_order_is_the_one_asked_for(tmp_path, order, shards, stacked):
    source = _checkpoint(tmp_path / "in", stacked)
    out = permute(source, tmp_path / "out", order, shards)
    pattern = {"shared_first": "s+r+", "shared_between": "r+s+r+", "shared_last": "r+s+"}.get(order, ".*")
    for layer in range(2):
        assert re.fullmatch(pattern, _order(out, layer))


@pytest.mark.parametrize("order", ORDERS)
def test_permuted_tensors_are_the_same(tmp_path, order):
    source = _checkpoint(tmp_path / "in", False)
    out = permute(source, tmp_path / "out", order, 4)
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    got = {n: t for file in out.glob("*.safetensors") for n, t in read_raw(file).items()}
    assert got == read_raw(source / "model.safetensors")
    assert all(n in read_raw(out / file) for n, file in index.items())
    assert set(index) == set(got)


def test_too_few_files_for_an_order(tmp_path):
    with pytest.raises(ValueError, match="needs more than 2 files"):
        permute(_checkpoint(tmp_path / "in", False), tmp_path / "out", "shared_between", 2)


def test_huge_headers_are_holes_of_full_length(tmp_path):
    out = huge_headers(tmp_path / "huge", tensors=60000, shards=40)
    files = sorted(out.glob("*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(files) == 40
    assert len(index["weight_map"]) == 60000
    assert sum(f.stat().st_size for f in files) > index["metadata"]["total_size"] > 1e11
    assert sum(f.stat().st_blocks for f in files) * 512 < 1e8


def test_stack_and_unstack_are_inverse():
    names = [
        f"model.layers.0.mlp.experts.{e}.{p}_proj.weight" for e in range(3) for p in ("gate", "up", "down")
    ]
    shapes = {"gate": (2, 4), "up": (2, 4), "down": (4, 2)}
    parts = {n: torch.randn(shapes[n.split(".")[-2][:-5]]) for n in names}
    stacked = weights.stack(parts)
    assert stacked["model.layers.0.mlp.experts.gate_up_proj"].shape == (3, 4, 4)
    back = weights.unstack(stacked)
    assert back.keys() == parts.keys()
    assert all(torch.equal(back[n], parts[n]) for n in parts)


def test_values_depend_on_name_and_seed_alone():
    like = torch.zeros(8, 8)
    one = weights.random_tensor("model.layers.0.mlp.gate.weight", like, 0)
    assert torch.equal(one, weights.random_tensor("model.layers.0.mlp.gate.weight", like, 0))
    assert not torch.equal(one, weights.random_tensor("model.layers.0.mlp.gate.weight", like, 1))
    assert not torch.equal(one, weights.random_tensor("model.layers.1.mlp.gate.weight", like, 0))


@pytest.mark.parametrize(
    ("needs", "there"), [("json", True), ("json.decoder", True), ("json.none", False), ("none.none", False)]
)
def test_a_recipe_is_for_where_it_can_be_made(needs: str, there: bool) -> None:
    recipe = replace(RECIPES["qwen4_exp"], needs=needs)
    assert recipe.can_be_made() == there
