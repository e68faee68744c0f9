"""Checkpoints laid out in files as the fuzzer does it, for engines that really load them."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .core.fuzz_files import merge, rename, spread, write_files

# What the name of such a checkpoint begins with; its number follows.
LAID_OUT = "laid_out_"


def lay_out(folder: Path, other: Path, seed: int) -> Path:
    """Lay out the checkpoint in ``folder``; ``other`` is the same one with other values."""
    rng = random.Random(f"laid out {seed}")
    tensors, others = (load_file(of / "model.safetensors") for of in (folder, other))
    (folder / "model.safetensors").unlink()
    values = {id(tensor): others[name] for name, tensor in tensors.items()}
    if rng.random() < 0.3:
        tensors = rename(rng, tensors)
    if rng.random() < 0.4:
        tensors = merge(rng, tensors, lambda *pair: torch.cat(pair), [".shared_expert.", ".experts."])
    files = spread(rng, tensors, lambda t: values.get(id(t), t + 1), ["auto"])

    def write(path: Path, held: dict[str, torch.Tensor]) -> None:
        save_file({n: t.clone() for n, t in held.items()}, path, {"format": "pt"})

    write_files(folder, files, write)
    return folder
