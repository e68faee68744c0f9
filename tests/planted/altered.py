"""Checkpoints that are wrong on disk: copies of a good one with one thing changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

Tensors = dict[str, torch.Tensor]
FILE = "model.safetensors"
ALTER: dict[str, Callable[[Path], None]] = {}


def make(name: str, source: Path, out: Path) -> Path:
    """A copy of ``source``, altered."""
    shutil.copytree(source, out)
    ALTER[name](out)
    return out


def alter(function: Callable[[Path], None]) -> Callable[[Path], None]:
    ALTER[function.__name__] = function
    return function


def tensors(change: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    def altered(folder: Path) -> None:
        from safetensors.torch import load_file, save_file  # engines have it

        changed = change(load_file(folder / FILE))
        save_file({name: t.contiguous() for name, t in changed.items()}, folder / FILE, {"format": "pt"})

    return altered


def config(**changes: object) -> Callable[[Path], None]:
    def altered(folder: Path) -> None:
        held = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**held, **changes}))

    return altered


@alter
def shared_in_another_dtype(folder: Path) -> None:
    tensors(lambda held: {n: t.to(torch.bfloat16) if ".shared_expert." in n else t for n, t in held.items()})(
        folder
    )


@alter
def one_layer_in_another_dtype(folder: Path) -> None:
    part = "layers.1.mlp.shared_expert."
    tensors(lambda held: {n: t.to(torch.bfloat16) if part in n else t for n, t in held.items()})(folder)


@alter
def shared_tensor_missing(folder: Path) -> None:
    tensors(lambda held: {n: t for n, t in held.items() if "layers.1.mlp.shared_expert.up_proj" not in n})(
        folder
    )


@alter
def shared_expert_missing_in_a_layer(folder: Path) -> None:
    tensors(lambda held: {n: t for n, t in held.items() if "layers.1.mlp.shared_expert." not in n})(folder)


@alter
def routed_expert_missing(folder: Path) -> None:
    tensors(lambda held: {n: t for n, t in held.items() if "layers.1.mlp.experts.5." not in n})(folder)


@alter
def routed_expert_too_many(folder: Path) -> None:
    def change(held: Tensors) -> Tensors:
        more = {
            n.replace(".experts.7.", ".experts.8."): t.clone() for n, t in held.items() if ".experts.7." in n
        }
        return {**held, **more}

    tensors(change)(folder)


@alter
def shared_wider_than_the_config_says(folder: Path) -> None:
    def change(held: Tensors) -> Tensors:
        return {n: torch.cat([t, t]) if "shared_expert.up_proj" in n else t for n, t in held.items()}

    tensors(change)(folder)


@alter
def shared_not_a_whole_number_of_slots(folder: Path) -> None:
    def change(held: Tensors) -> Tensors:
        axis = {"gate": 0, "up": 0, "down": 1}
        out = dict(held)
        for name, t in held.items():
            for part, dim in axis.items():
                if f"shared_expert.{part}_proj" in name:
                    out[name] = torch.cat([t, t.narrow(dim, 0, 16)], dim=dim)
        return out

    tensors(change)(folder)
    config(shared_expert_intermediate_size=48)(folder)
