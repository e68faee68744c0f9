"""Random checkpoints and policies: golden rows, changed in places that are known to matter and in others."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import dataclass
from typing import Any

from fse_patch.fusion_core.decision.policy_file import DEFAULT_POLICY

from .checkpoints import SHARED, Tensors
from .fuzz_files import FORMATS, FileSet, merge, rename, spread
from .golden import MODELS, ROWS, config_and_tensors, projections, shared_width

SEEDS = [(row, *config_and_tensors(row)) for row in ROWS if "stored" in row]
# Checkpoints of one 4-bit format, and what their shared experts may be stored as beside it.
FOUR_BITS = [
    seed
    for seed in SEEDS
    if seed[0]["stored"]["routed"].startswith("int4") and seed[0]["expect"]["reason"] in ("ok", "quant.mixed")
]
BESIDE = ["bf16", "f16", "fp8-channel", "fp8-block:128", "fp8-tensor", "int8-gptq:128", "int8-packed:128"]
# Methods that nothing of ours reads, by any layout.
NEVER = ("quark", "mxfp4")
_DTYPES = ["BF16", "F16", "F32", "F8_E4M3", "I32", "I8", "U8", "I64"]
_WORDS = ["fp8", "awq", "gptq", "inc", "quark", "mxfp4", "modelopt", "compressed-tensors", "auto-round", "x"]
_PATTERNS = ["re:.*", "-:.*", "+:(a+)+$", ".*experts.*", "re:(", "*", "model.layers.0", "experts", "é\n"]
_NEW_KEYS = [
    "method",
    "expert_dtype",
    "static_kv_granularity",
    "meta",
    "pack_dtype",
    "scheme",
    "modules",
    "é",
]
_LAYER_KEYS = (
    "num_hidden_layers", "first_k_dense_replace", "mlp_only_layers", "decoder_sparse_step",
    "num_nextn_predict_layers", "mtp_num_hidden_layers",
)  # fmt: skip
ALLOW_ALL = """\
version: 1
rules:
  - {id: allow-all, when: {}, fuse: true, why: control, source: none}
"""


@dataclass
class Case:
    """One input. ``forbidden`` says that it must not fuse, whatever tensors alone say.

    ``layers`` is what the unchanged config says of them. ``raw`` holds bytes that replace those of a file
    after it is written, as (file, position, byte). ``files`` says in which files the tensors lie, if not one.
    """

    config: dict[str, Any]
    tensors: Tensors | None
    modelopt: dict[str, Any] | None = None
    policy: str | None = None
    forbidden: str = ""
    raw: tuple[tuple[str, float, int], ...] = ()
    layers: str = ""
    files: FileSet[Any] | None = None
    # Whether weights that stay apart may pair by the default policy; None: nothing is known.
    pairs: bool | None = None


def make(rng: random.Random) -> Case:
    """A random case; the same generator state gives the same case."""
    row, config, tensors = rng.choice(SEEDS)
    case = Case(copy.deepcopy(config), dict(tensors or {}), copy.deepcopy(row.get("modelopt")))
    case.layers = layers_in(config)
    quant = row.get("quantization") or {}
    if quant.get("quant_method") in NEVER and rng.random() < 0.5:
        case.pairs = False
        return case
    kind = rng.random()
    if kind < 0.06:
        return _mixed(rng)
    if kind < 0.2:
        _lay_out(rng, case)
    elif kind < 0.5:
        for _ in range(rng.choice([0, 1, 1, 2, 3])):
            _change_tensor(rng, case)
    elif kind < 0.62:
        _contradict(rng, case, row)
    elif kind < 0.8:
        for _ in range(rng.randint(1, 3)):
            _change_config(rng, case)
    elif kind < 0.9:
        files = ["config.json", "model-00001-of-00001.safetensors"]
        case.raw = tuple(
            (rng.choice(files), rng.random(), rng.randrange(256)) for _ in range(rng.randint(1, 4))
        )
    else:
        _change_config(rng, case)
        _change_tensor(rng, case)
    choice = rng.random()
    if choice < 0.3:
        case.policy = ALLOW_ALL
    elif choice < 0.35:
        case.policy = _policy(rng)
    return case


def _mixed(rng: random.Random) -> Case:
    """4-bit routed experts beside a shared one that is stored otherwise, in some layers or in all."""
    row, config, tensors = rng.choice(FOUR_BITS)
    model = MODELS[row["model"]]
    case = Case(copy.deepcopy(config), dict(tensors or {}), layers=layers_in(config), pairs=True)
    assert case.tensors is not None
    # Some recipes leave whole layers plain: a plain shared expert is no other format there.
    packed = {name.partition(".experts.")[0] for name, (dtype, _) in case.tensors.items() if dtype == "I32"}
    numbers = [number for number in _sparse(case) if _module(case, number) in packed]
    for number in rng.sample(numbers, rng.randint(1, len(numbers))):
        owner = f"{_module(case, number)}.{SHARED[model['family']]}."
        kept = {name: header for name, header in case.tensors.items() if not name.startswith(owner)}
        way = rng.choice(BESIDE)
        case.tensors = kept | projections(owner, shared_width(model), model["hidden"], way)
        if way.startswith("int8"):
            case.pairs = None  # packed integers look alike in the headers: that is a contradiction
    case.forbidden = "routed experts of 4 bits beside a shared one of another format"
    if rng.random() < 0.4:
        case.policy = ALLOW_ALL
    return case


def _lay_out(rng: random.Random, case: Case) -> None:
    """Change names and files, and now and then a tensor or a key too."""
    assert case.tensors is not None
    if rng.random() < 0.3:
        case.tensors = rename(rng, case.tensors)
    if rng.random() < 0.3:
        case.tensors = merge(rng, case.tensors, _together, [".shared_expert", ".experts.", ".experts.1."])
    if rng.random() < 0.2:
        _change_tensor(rng, case)
    quant = case.config.get("quantization_config")
    if isinstance(quant, dict) and rng.random() < 0.2:
        quant[rng.choice(_NEW_KEYS)] = value(rng)
    if case.tensors:
        case.files = spread(rng, case.tensors, lambda header: _other(rng, header), FORMATS)


def _together(gate: Any, up: Any) -> Any:
    """The header of gate and up in one; of shapes that do not fit, that of gate."""
    (dtype, shape), (_, other) = gate, up
    return (dtype, (shape[0] + other[0], *shape[1:])) if shape and other else gate


def _other(rng: random.Random, header: Any) -> Any:
    """Another header in a stale file: of another dtype, or of the same."""
    return (rng.choice(["BF16", "F16", "F32"]), header[1]) if rng.random() < 0.5 else header


def layers_in(config: dict[str, Any]) -> str:
    """What a config says of which layers are sparse, as text to compare."""
    inner = config.get("text_config")
    text = inner if isinstance(inner, dict) else config
    return json.dumps([config.get("model_type"), *(text.get(key) for key in _LAYER_KEYS)])


def _change_tensor(rng: random.Random, case: Case) -> None:
    tensors = case.tensors
    assert tensors is not None
    experts = [name for name in tensors if "_proj" in name]
    if not experts:
        return
    name = rng.choice(experts)
    dtype, shape = tensors[name]
    how = rng.randrange(7)
    if how == 0:
        del tensors[name]
    elif how == 1:
        tensors[name] = (rng.choice(_DTYPES), shape)
    elif how == 2:
        tensors[name] = (dtype, shape[::-1])
    elif how == 3:
        tensors[name] = (dtype, (*shape, 1) if rng.random() < 0.5 else shape[:-1])
    elif how == 4 and shape:
        at = rng.randrange(len(shape))
        changed = max(0, rng.choice([shape[at] * 2, shape[at] // 2, shape[at] + 1, 0, 1]))
        tensors[name] = (dtype, (*shape[:at], changed, *shape[at + 1 :]))
    elif how == 5:
        other = rng.choice(experts)
        tensors[name], tensors[other] = tensors[other], tensors[name]
    else:
        old, new = rng.choice(
            [
                ("weight", "bias"),
                (".experts.", ".shared_expert."),
                (".0.", ".1."),
                ("mlp.", ""),
                (".0.", f".{'9' * 5000}."),
                (".weight", ""),
                ("_proj", "\n\ud800"),
            ]
        )
        tensors[name.replace(old, new)] = tensors[name]


def _contradict(rng: random.Random, case: Case, row: dict[str, Any]) -> None:
    """One change of the config alone that the stored tensors of a fusing checkpoint cannot follow."""
    if row["expect"]["reason"] != "ok" or "quantization" not in row:
        return
    quant, method = case.config["quantization_config"], row["quantization"].get("quant_method")
    layers = row.get("layers", {})
    number = rng.choice([n for n in _sparse(case) if n not in layers])
    module = _module(case, number)
    if row["stored"]["routed"] in ("bf16", "f16", "f32", "stacked"):
        return
    lists = {"fp8": "ignored_layers", "awq": "modules_to_not_convert", "fbgemm_fp8": "modules_to_not_convert"}
    side = rng.choice([".experts", ".shared_expert" + ("s" if _is_glm(case) else "")])
    if method in lists:
        # A whole side, or one projection of the shared expert.
        part = rng.choice(["", ".up_proj"]) if "shared" in side else ""
        quant.setdefault(lists[method], []).append(module + side + part)
    elif method == "compressed-tensors":
        quant["ignore"].append(f"re:.*layers\\.{number}\\.mlp\\{side}\\..*")
    elif method in ("gptq", "auto-round", "inc"):
        if method == "gptq":
            rule = {f"-:.*layers\\.{number}\\.mlp\\{side}\\..*": {}}
            quant["dynamic"] = rule | quant.get("dynamic", {})
        else:
            quant.setdefault("extra_config", {})[f"layers\\.{number}\\.mlp\\{side}\\."] = {"bits": 16}
    else:
        return
    case.forbidden = f"config leaves {module}{side} unquantised, and it is stored quantised"


def _sparse(case: Case) -> list[int]:
    return sorted(
        {
            int(name.split(".mlp.")[0].rpartition(".")[2])
            for name in case.tensors or {}
            if "_proj" in name and not name.startswith("mtp.")
        }
    )


def _module(case: Case, number: int) -> str:
    name = next(n for n in case.tensors or {} if f".layers.{number}.mlp." in f".{n}" and "mtp" not in n)
    return name.partition(".mlp.")[0] + ".mlp"


def _is_glm(case: Case) -> bool:
    return bool(case.config["model_type"] == "glm4_moe")


def value(rng: random.Random, depth: int = 3) -> Any:
    """Any JSON value, near the ones that matter more often than not."""
    pick = rng.randrange(9 if depth else 7)
    simple: list[Any] = [None, True, rng.randint(-3, 200), 1 << rng.randint(3, 70), rng.uniform(-3, 9),
                         rng.choice(_WORDS), rng.choice(_PATTERNS)]  # fmt: skip
    if pick < 7:
        return simple[pick]
    if pick == 7:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {str(value(rng, 0)): value(rng, depth - 1) for _ in range(rng.randrange(4))}


def _change_config(rng: random.Random, case: Case) -> None:
    """Replace, drop or add a value anywhere in the config."""
    node: Any = case.config
    if rng.random() < 0.7 and isinstance(node.get("quantization_config"), dict):
        node = node["quantization_config"]
    if case.modelopt and rng.random() < 0.5:
        node = case.modelopt
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.6:
            node = node[key]
            continue
        break
    if isinstance(node, dict) and rng.random() < 0.3:
        node.pop(key)
    elif isinstance(node, dict) and rng.random() < 0.2:
        node[str(value(rng, 0))] = value(rng)
    else:
        node[key] = value(rng)


def _policy(rng: random.Random) -> str:
    lines = DEFAULT_POLICY.read_text(encoding="utf-8").splitlines()
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(lines))
        how = rng.randrange(4)
        if how == 0:
            lines[at] = ""
        elif how == 1:
            lines[at] = lines[rng.randrange(len(lines))]
        elif how == 2:
            lines[at] = lines[at].replace("false", "true").replace("quant.mixed", "ok")
        else:
            lines[at] = lines[at][: rng.randrange(9)] + json.dumps(value(rng))
    # Ids of the default policy are taken.
    return "\n".join(lines).replace("- id: ", "- id: own-")
