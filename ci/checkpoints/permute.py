"""The same checkpoint with its tensors in another order."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from .raw import read_raw, write_index, write_raw

Order = Literal["shared_first", "shared_between", "shared_last", "shuffled"]
ORDERS: tuple[Order, ...] = ("shared_first", "shared_between", "shared_last", "shuffled")
_ROUTED = re.compile(r"\.mlp\.experts\.")
_SHARED = re.compile(r"\.mlp\.shared_experts?\.")


def permute(
    checkpoint: str | Path, out: str | Path, order: Order = "shuffled", shards: int = 4, seed: int = 0
) -> Path:
    """Rewrite ``checkpoint`` to ``out`` with its tensors dealt over ``shards`` files.

    Loaders read files in the order of their names, and within a file either by name (``safe_open().keys()``
    sorts) or by offset. So the order between files is what counts: shared-expert tensors get files of their
    own, before, between or after those of the routed experts. "shuffled" deals every tensor at random.

    Args:
        order: where the shared experts' tensors come, seen from the routed experts of the same layer.
        shards: number of files; "shared_between" needs 3, the others 2.
    """
    source, folder = Path(checkpoint), Path(out)
    if shards < (3 if order == "shared_between" else 2):
        raise ValueError(f"{order} needs more than {shards} files")
    rng = random.Random(seed)
    tensors: dict[str, tuple[str, list[int], bytes]] = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors |= read_raw(file)
    pick = _dealer(order, shards, sorted(tensors), rng)
    # Offsets go against the names, so that readers by name and by offset see different orders.
    names = sorted(tensors, reverse=True)
    placed = {name: pick(name) for name in names}
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(
        source, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json")
    )
    files: dict[str, str] = {}
    for number in range(shards):
        chosen = [n for n in names if placed[n] == number]
        file_name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        write_raw(folder / file_name, {n: tensors[n] for n in chosen})
        files |= dict.fromkeys(chosen, file_name)
    write_index(folder, files, sum(len(data) for _, _, data in tensors.values()))
    return folder


def _dealer(order: Order, shards: int, names: list[str], rng: random.Random) -> Callable[[str], int]:
    """Return which file, counted from 0, a tensor goes to."""
    if order == "shuffled":
        return lambda name: rng.randrange(shards)
    alone = {"shared_first": 0, "shared_last": shards - 1, "shared_between": shards // 2}[order]
    # From the outside in, so that even the two tensors of a 3-D layer lie on both sides of a shared file
    # between them.
    others = sorted((s for s in range(shards) if s != alone), key=lambda s: (min(s, shards - 1 - s), s))
    counter: dict[str, int] = {}

    def pick(name: str) -> int:
        if _SHARED.search(name):
            return alone
        if _ROUTED.search(name):
            # Round robin a layer: each layer's routed experts lie on both sides of the shared file.
            layer = name.split(".mlp.")[0]
            counter[layer] = counter.get(layer, -1) + 1
            return others[counter[layer] % len(others)]
        return rng.randrange(shards)

    return pick
