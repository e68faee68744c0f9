"""Which files an engine loads: what decision, audit and canary read, and no others."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.checkpoint.sources import FolderSource
from fse_patch.fusion_core.checkpoint.weight_files import weight_files
from fse_patch.fusion_core.decision.decide import decide
from fse_patch.fusion_core.engines import facts_of

from .checkpoints import config_of, model_tensors, write_checkpoint, write_shard
from .outcomes import merged, stock

INDEX, OTHER_INDEX = "model.safetensors.index.json", "consolidated.safetensors.index.json"
MTP = "mtp.safetensors"


def chosen(folder: Path, engine: str, load_format: str = "auto") -> list[str]:
    return list(weight_files(FolderSource(folder), engine, load_format).names)


def put(folder: Path, *names: str, index: Sequence[str] = (), other_index: Sequence[str] = ()) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")
    for file, listed in ((INDEX, index), (OTHER_INDEX, other_index)):
        if listed:
            (folder / file).write_text(json.dumps({"weight_map": {f"t{n}": f for n, f in enumerate(listed)}}))
    return folder


SHARDS = ("a.safetensors", "b.safetensors")
MODEL, CONSOLIDATED = "model.safetensors", "consolidated.safetensors"
# Files, what the index names, load format -> what vLLM and what SGLang load; as their loaders have it, vLLM
# model_executor/model_loader/default_loader.py, SGLang srt/model_loader/loader.py, DefaultModelLoader.
ROWS: list[tuple[tuple[str, ...], tuple[str, ...], str, tuple[str, ...], tuple[str, ...]]] = [
    (SHARDS, (), "auto", SHARDS, SHARDS),
    ((*SHARDS, "stale.safetensors"), SHARDS, "auto", SHARDS, SHARDS),
    (("._model.safetensors", MODEL), (), "auto", (MODEL,), (MODEL,)),
    ((MODEL, "pytorch_model.bin"), (), "auto", (MODEL,), (MODEL,)),
    ((MODEL, "model.pt"), (), "pt", ("model.pt",), ("model.pt",)),
    ((MODEL, "pytorch_model.bin"), (), "npcache", ("pytorch_model.bin",), ("pytorch_model.bin",)),
    (("pytorch_model.bin",), (), "auto", ("pytorch_model.bin",), ("pytorch_model.bin",)),
    (("model.pt",), (), "auto", ("model.pt",), ("model.pt",)),
    (("model.pt",), (), "safetensors", (), ("model.pt",)),
    ((*SHARDS, CONSOLIDATED), SHARDS, "auto", (CONSOLIDATED,), SHARDS),
    ((*SHARDS, CONSOLIDATED), SHARDS, "safetensors", SHARDS, SHARDS),
    ((*SHARDS, CONSOLIDATED), SHARDS, "mistral", (CONSOLIDATED,), (CONSOLIDATED,)),
    ((MODEL, CONSOLIDATED), (), "auto", (CONSOLIDATED,), (MODEL,)),
    ((MODEL, CONSOLIDATED), (), "safetensors", (CONSOLIDATED, MODEL), (MODEL,)),
    ((MODEL, "other.safetensors"), (), "auto", (MODEL, "other.safetensors"), (MODEL, "other.safetensors")),
    ((*SHARDS, "stale.safetensors"), SHARDS, "runai_streamer", (*SHARDS, "stale.safetensors"), SHARDS),
    ((*SHARDS, "stale.safetensors"), SHARDS, "fastsafetensors", SHARDS, SHARDS),
    ((*SHARDS, "stale.safetensors"), SHARDS, "instanttensor", SHARDS, SHARDS),
    ((*SHARDS, "stale.safetensors"), SHARDS, "dummy", SHARDS, SHARDS),
    (("README.md", "fig.png"), (), "auto", (), ()),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[2]}-{'+'.join(row[0])}")
def test_the_files_are_those_that_each_engine_loads(tmp_path: Path, row: tuple[tuple[str, ...], ...]) -> None:
    files, index, load_format, vllm, sglang = row
    put(tmp_path, *files, index=index)
    assert tuple(chosen(tmp_path, "vllm", str(load_format))) == vllm
    assert tuple(chosen(tmp_path, "sglang", str(load_format))) == sglang


def test_each_pattern_has_its_own_index(tmp_path: Path) -> None:
    parts = ("consolidated-1.safetensors", "consolidated-2.safetensors")
    put(tmp_path, *SHARDS, *parts, "consolidated-old.safetensors", index=SHARDS, other_index=parts)
    assert chosen(tmp_path, "vllm") == list(parts)
    assert chosen(tmp_path, "sglang") == list(SHARDS)


def test_a_shard_that_an_index_names_must_be_there(tmp_path: Path) -> None:
    put(tmp_path, SHARDS[0], index=SHARDS)
    with pytest.raises(FsePatchError, match=rf"b\.safetensors: missing, but {INDEX} names it"):
        chosen(tmp_path, "vllm")


def test_a_link_that_leads_nowhere_is_missing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, config_of("qwen2_moe"), model_tensors("qwen2_moe"))
    assert merged(decide(tmp_path, "vllm"))
    os.symlink(tmp_path / "gone", tmp_path / "z.safetensors")
    with pytest.raises(FsePatchError, match=r"z\.safetensors: missing, or a link that leads nowhere"):
        decide(tmp_path, "vllm")


def test_sglang_adds_the_drafts_file_of_some_classes(tmp_path: Path) -> None:
    put(tmp_path, *SHARDS, MTP, index=SHARDS)
    config = {"architectures": ["Glm4MoeForCausalLM"], "num_nextn_predict_layers": 1}

    def seen(engine: str, **changes: object) -> bool:
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        return MTP in chosen(tmp_path, engine)

    assert seen("sglang")
    # The controls: another engine, another class, no draft.
    assert not seen("vllm")
    assert not seen("sglang", architectures=["Qwen2MoeForCausalLM"])
    assert not seen("sglang", architectures=None)
    assert not seen("sglang", num_nextn_predict_layers=0)


@pytest.mark.parametrize(
    ("name", "load_format", "code"),
    [
        ("model.pt", "pt", "load.format"),
        ("model.bin", "npcache", "load.format"),
        ("model.bin", "auto", "evidence.unreadable"),
    ],
)
def test_files_without_headers_are_refused_whatever_lies_beside(
    tmp_path: Path, name: str, load_format: str, code: str
) -> None:
    tensors = model_tensors("qwen2_moe")
    write_checkpoint(tmp_path, config_of("qwen2_moe"), None if load_format == "auto" else tensors)
    put(tmp_path, name)
    reason = stock(decide(tmp_path, "vllm", load_format=load_format)).reason
    assert (reason.code, name in reason.detail) == (code, True)
    if load_format != "auto":
        assert merged(decide(tmp_path, "vllm"))


def test_a_load_format_that_is_not_known_is_refused_and_the_tensors_are_looked_at(tmp_path: Path) -> None:
    tensors = model_tensors("qwen2_moe")
    write_checkpoint(tmp_path, config_of("qwen2_moe"), tensors)
    refused = stock(decide(tmp_path, "sglang", load_format="layered"))
    assert refused.reason.code == "load.format"
    assert "layered" in refused.reason.detail
    # An engine that fuses by itself must know what it would mix.
    assert refused.stored_alike is True
    assert "layered" not in facts_of("sglang").load_formats


def test_the_decision_follows_the_files_that_are_loaded(tmp_path: Path) -> None:
    """vLLM loads consolidated files, SGLang the shards: one checkpoint, two decisions, each right."""
    plain = model_tensors("qwen2_moe")
    write_checkpoint(tmp_path, config_of("qwen2_moe"), plain, shards=2, index=True)
    mixed = {n: ("F16" if "shared_expert." in n else d, s) for n, (d, s) in plain.items()}
    write_shard(tmp_path / CONSOLIDATED, mixed)
    assert stock(decide(tmp_path, "vllm")).reason.code == "quant.mixed"
    assert merged(decide(tmp_path, "sglang"))
    assert merged(decide(tmp_path, "vllm", load_format="safetensors"))


def test_tensors_that_an_index_leaves_out_are_seen(tmp_path: Path) -> None:
    tensors = model_tensors("qwen2_moe")
    write_checkpoint(tmp_path, config_of("qwen2_moe"), tensors, shards=2, index=True)
    index = json.loads((tmp_path / INDEX).read_text())
    first, last = sorted(set(index["weight_map"].values()))
    wrong = {name: last if file == first else first for name, file in index["weight_map"].items()}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": wrong}))
    assert merged(decide(tmp_path, "vllm"))
    short = {"lm_head.weight": first, "model.layers.1.mlp.gate.weight": last}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": short}))
    assert merged(decide(tmp_path, "vllm"))
    # The control: a shard that the index does not name is not loaded.
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": first}}))
    assert stock(decide(tmp_path, "vllm"))


@pytest.mark.parametrize("index", [False, True])
def test_a_tensor_in_two_files_is_named_with_both(tmp_path: Path, index: bool) -> None:
    tensors = model_tensors("qwen2_moe")
    write_checkpoint(tmp_path, config_of("qwen2_moe"), tensors, shards=2, index=index)
    name = next(iter(tensors))
    extra = tmp_path / "model-00002-of-00002.safetensors"
    write_shard(extra, dict(list(tensors.items())[len(tensors) // 2 :]) | {name: tensors[name]})
    with pytest.raises(FsePatchError, match=f"{name!r} is also in model-00001") as caught:
        decide(tmp_path, "vllm")
    assert "index" not in str(caught.value)
