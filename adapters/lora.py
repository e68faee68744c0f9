"""LoRA: adapters on attention alone run beside layers of ours; what would change their experts is refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import FsePatchError
from ..fusion_core.checkpoint.headers import read_file_header
from ..fusion_core.checkpoint.sources import read_json
from ..fusion_core.reasons import Reason

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

# Modules of a sparse block, and words that stand for every module.
BLOCK = frozenset({"mlp", "experts", "shared_expert", "shared_experts", "shared_expert_gate", "gate"})
PROJECTIONS = frozenset({"gate_up_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "w13"})
EVERY = frozenset({"all", "all-linear"})
IN_BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)\.mlp(?:\.|$)")


def refused_targets(targets: Iterable[str] | None, flag: str) -> Iterator[Reason]:
    """Refuse modules that adapters may change, where a layer of ours reads one of them.

    Args:
        targets: names of modules, or ends of them, as the user limits adapters to; None: every module.
        flag: the argument that limits them.
    """
    advice = f"give {flag} with modules of the attention alone"
    if not targets:
        yield Reason("lora", f"LoRA adapters may change experts; {advice}")
    elif named := sorted(name for name in targets if touches_block(name)):
        yield Reason("lora", f"LoRA adapters may change {named[0]}; {advice}")


def refused_adapters(
    targets: Iterable[str] | None, adapters: Mapping[str, str], flag: str
) -> Iterator[Reason]:
    """Refuse adapters that are there at the start and change a layer of ours, and any that may come.

    Without a limit an engine that knows its adapters takes the modules of these, and no others later.

    Args:
        targets, flag: as of `refused_targets`.
        adapters: folders by the adapters' names.
    """
    changes = {name: changed_by(Path(folder)) for name, folder in adapters.items()}
    for name, modules in changes.items():
        if named := sorted(filter(touches_block, modules or ())):
            why = f"LoRA adapter {name!r} changes {named[0]}; start with adapters of the attention alone"
            yield Reason("lora", why)
    if targets or not changes or None in changes.values():
        yield from refused_targets(targets, flag)


def folders_of(paths: Iterable[Any] | Mapping[str, str] | None) -> dict[str, str]:
    """Return the folders of adapters by name, as they are given or in the records that SGLang makes."""
    if isinstance(paths, Mapping):
        return dict(paths)
    folders = {}
    for given in filter(None, paths or ()):
        if isinstance(given, str):  # NAME=FOLDER, or a folder
            name, named, folder = given.partition("=")
            folders[name] = folder if named else name
        elif isinstance(given, Mapping):
            folders[given["lora_name"]] = given["lora_path"]
        else:
            folders[given.lora_name] = given.lora_path
    return folders


def changed_by(folder: Path) -> list[str] | None:
    """Return the modules that an adapter's config and tensors name; None where they are not to be read."""
    file = folder.expanduser() / TENSORS
    try:
        config = read_json(folder.expanduser() / CONFIG)
        tensors = list(read_file_header(file).entries) if file.is_file() else []
    except FsePatchError:
        return None
    modules, parameters = config.get("target_modules"), config.get("target_parameters") or []
    # One word in place of a list may stand for all modules, or be a pattern.
    if not (isinstance(modules, list) and isinstance(parameters, list)):
        return None
    return [str(name) for name in (*modules, *parameters, *tensors)]


def touches_block(name: str) -> bool:
    """Return whether a name of a module, or its end, can stand for a part of a sparse block."""
    parts = name.split(".")
    return parts[-1] in PROJECTIONS | EVERY or not BLOCK.isdisjoint(parts)


def check_adapter(adapter: str, names: Iterable[str]) -> None:
    """Stop an adapter that changes a part of a layer of ours: its answers would be wrong without a word.

    Args:
        adapter: its name, for the error.
        names: of its modules or tensors.

    Raises:
        FsePatchError: it changes experts, or a gate.
    """
    from .paired import constructed as paired_roles  # these need torch
    from .role import constructed as merged_roles

    merged = {n for role in merged_roles() if role.layers for n in role.start.moe.layers}
    paired = {n for role in paired_roles() for n in role.start.decision.moe.layers}
    for name in names:
        match = IN_BLOCK.search(name)
        if match and int(match[1]) in merged | paired:
            raise FsePatchError(
                f"LoRA adapter {adapter!r} changes {name}, and fse_patch runs the shared expert with the "
                "routed ones; give an adapter of the attention alone, or start again with FSE_PATCH=0"
            )
