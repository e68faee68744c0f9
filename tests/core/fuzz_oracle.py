"""Says of tensors and sizes alone that fusing them would be wrong; shares no code with the decision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .checkpoints import Tensors
from .fuzz_files import INDEX, OTHER_INDEX, FileSet

_SHARED = ("shared_expert", "shared_experts")
# Prefixes of layers, by the beginning of the model's type; what an engine makes of others, nobody has said.
_PREFIXES = {
    "qwen2": ("model.layers",),
    "qwen3_next": ("model.layers", "mtp.layers"),
    "qwen3_5": ("model.layers", "model.language_model.layers", "mtp.layers"),
    "qwen4": ("model.layers", "model.language_model.layers", "mtp.layers"),
    "glm4v": ("model.layers", "model.language_model.layers"),
    "glm4_moe": ("model.layers",),
}
# Of vLLM's own modules, in models that see pictures.
_OF_VLLM = "language_model.model.layers"
_PLAIN = ("BF16", "F16", "F32")


def loaded_files(files: FileSet[Any], engine: str, config: Mapping[str, Any]) -> list[str] | None:
    """Name the files that an engine loads; None where it stops, or where what it loads has no headers.

    After vLLM 0.32 model_executor/model_loader/{default_loader,weight_utils}.py, and SGLang 0.5.20
    srt/model_loader/{loader,weight_utils}.py.
    """
    there = {*files.tensors, *files.others, *files.links}
    form = files.load_format

    def like(pattern: str) -> set[str]:
        head, _, tail = pattern.partition("*")
        return {n for n in there if n.startswith(head) and n.endswith(tail) and not n.startswith(".")}

    safe = {"safetensors", "fastsafetensors", "instanttensor", "runai_streamer"}
    index = INDEX
    if form == "mistral" or (
        form in ("auto", "dummy") and engine == "vllm" and like("consolidated*.safetensors")
    ):
        chosen, index = like("consolidated*.safetensors"), OTHER_INDEX
    elif form in ("auto", "hf", "dummy") or form in safe:
        chosen = like("*.safetensors")
    else:
        return None
    if not chosen or (form == "hf" and engine == "sglang"):
        return None
    by_index = index in files.indexes and not (form == "runai_streamer" and engine == "vllm")
    if by_index:
        listed = set(files.indexes[index].values())
        if not listed or listed - chosen:
            return None
        chosen = listed
    elif engine == "sglang" and chosen == {"consolidated.safetensors", "model.safetensors"}:
        chosen = {"model.safetensors"}
    if chosen & (set(files.links) | set(files.others)):
        return None
    return sorted(chosen)


def reasons_not_to_fuse(
    config: Mapping[str, Any], tensors: Tensors, draft: bool, engine: str = "vllm"
) -> str:
    """Why the main model (or the draft) must not fuse, or "" where nothing here forbids it.

    Looks at every layer that has an expert tensor; knows nothing of quantisation configs.
    """
    text = config.get("text_config", config)
    family = "glm" if config["model_type"] == "glm4_moe" else "qwen"
    experts = text["n_routed_experts" if family == "glm" else "num_experts"]
    hidden, width = text["hidden_size"], text["moe_intermediate_size"]
    slots = text["n_shared_experts"] if family == "glm" else text["shared_expert_intermediate_size"] / width
    layers: dict[tuple[bool, int], dict[str, dict[str, Any]]] = {}
    prefixes = next(known for start, known in _PREFIXES.items() if config["model_type"].startswith(start))
    for name, header in tensors.items():
        words = name.split(".")
        if "mlp" not in words or not {"experts", *_SHARED} & set(words):
            continue
        at = words.index("mlp")
        prefix = ".".join(words[: at - 1])
        mapped = engine == "vllm" and prefix == _OF_VLLM and "model.language_model.layers" in prefixes
        if prefix not in prefixes and not mapped and draft == ("mtp" in words) and len(words) > at + 2:
            return f"{name} is under no prefix that is known"
        if not words[at - 1].isdecimal() or len(words[at - 1]) > 9:
            continue
        number = int(words[at - 1])
        is_draft = words[0] == "mtp" or (family == "glm" and number >= text["num_hidden_layers"])
        rest = words[at + 1 :]
        # An expert's number is the word behind "experts"; one tensor of all experts has none.
        numbered = rest[0] == "experts" and rest[1].isdecimal()
        owner = rest[1] if numbered else "shared" if rest[0] in _SHARED else "all"
        found = layers.setdefault((is_draft, number), {}).setdefault(owner, {})
        found[".".join(rest[2 if numbered else 1 :])] = header
    # Layers that config.json does not have are not built.
    key = (
        "mtp_num_hidden_layers" if config["model_type"].startswith("qwen3_5") else "num_nextn_predict_layers"
    )
    first = text["num_hidden_layers"] if family == "glm" else 0
    declared = text.get(key) or 1 << 30
    mine = {layer: owners for (is_draft, layer), owners in layers.items() if is_draft == draft}
    if draft:
        mine = {layer: owners for layer, owners in mine.items() if layer < first + declared}
    if not mine:
        return "no expert tensors at all"
    for owners in mine.values():
        for owner, held in owners.items():
            _take_apart(held, owner)
    for layer, owners in sorted(mine.items()):
        if wrong := _layer(owners, experts, hidden, width, slots):
            return f"layer {layer}: {wrong}"
    return ""


def _take_apart(held: dict[str, Any], owner: str) -> None:
    """Read one plain tensor of gate and up as the two that it is."""
    dtype, shape = held.get("gate_up_proj.weight", ("", ()))
    if owner != "all" and dtype in _PLAIN and len(shape) == 2 and shape[0] % 2 == 0:
        del held["gate_up_proj.weight"]
        for name in ("gate_proj.weight", "up_proj.weight"):
            if name in held:
                held["twice"] = ("", ())
            held[name] = (dtype, (shape[0] // 2, shape[1]))


def _layer(
    owners: Mapping[str, Mapping[str, Any]], experts: int, hidden: int, width: int, slots: float
) -> str:
    shared = owners.get("shared")
    if not shared:
        return "no shared expert"
    if "all" in owners:
        if set(owners) != {"all", "shared"}:
            return "one tensor of all experts, and single ones"
        expected = {"gate_up_proj": (experts, 2 * width, hidden), "down_proj": (experts, hidden, width)}
        if {n: h[1] for n, h in owners["all"].items()} != expected:
            return "tensors of all experts of another size"
        for projection, parts in (("gate_up_proj", ("gate_", "up_", "gate_up_")), ("down_proj", ("down_",))):
            kinds = {owners["all"][projection][0]} | {h[0] for n, h in shared.items() if n.startswith(parts)}
            if len(kinds) > 1:
                return f"{projection} is stored as {sorted(kinds)}"
        return ""
    routed = [owners.get(str(number)) for number in range(experts)]
    if set(owners) != {"shared", *map(str, range(experts))}:
        return f"experts {sorted(owners)}"
    if any(expert != routed[0] for expert in routed) or routed[0] is None:
        return "experts differ"
    if routed[0].keys() != shared.keys():
        return f"other tensors: {sorted(routed[0].keys() ^ shared.keys())}"
    for name, (dtype, shape) in routed[0].items():
        other_dtype, other = shared[name]
        if dtype != other_dtype:
            return f"{name} is {dtype} and {other_dtype}"
        if not _scaled(shape, other, slots):
            return f"{name} is {shape} and {other}"
    if not any(name.startswith("gate") for name in shared) or not any("down" in name for name in shared):
        return "projections are missing"
    return ""


def _scaled(mine: tuple[int, ...], other: tuple[int, ...], slots: float) -> bool:
    """Whether ``other`` is ``mine``, wider by the number of slots in at most one place."""
    if len(mine) != len(other):
        return False
    changed = [(a, b) for a, b in zip(mine, other, strict=True) if a != b]
    return len(changed) <= 1 and all(b == a * slots for a, b in changed)
