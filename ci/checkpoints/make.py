"""Writes one checkpoint folder of a recipe."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from . import models, weights
from .recipes import RECIPES
from .variants import VARIANTS


def make(recipe: str, out: str | Path, dtype: str = "float32", seed: int = 0) -> Path:
    """Write the checkpoint ``recipe`` to the folder ``out`` and return it.

    Args:
        recipe: a name in RECIPES or VARIANTS.
        out: the checkpoint's own folder; an existing one is replaced.
        dtype: "float32" or "bfloat16". bfloat16 values are the rounded float32 ones.
        seed: another seed gives other weights under the same names.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar a checkpoint would drown everything else in a test log
    if recipe in VARIANTS:
        variant = VARIANTS[recipe]
        made = make(variant.recipe, out, dtype, seed)
        with tempfile.TemporaryDirectory() as scratch:
            variant.change(made, make(variant.recipe, scratch, dtype, seed + 1))
        return made
    spec = RECIPES[recipe]
    folder = Path(out)
    if folder.exists():
        shutil.rmtree(folder)
    with tempfile.TemporaryDirectory() as scratch:
        spec.build().to(getattr(torch, dtype)).save_pretrained(scratch)
        tensors = weights.unstack(load_file(Path(scratch) / "model.safetensors"))
        config = json.loads((Path(scratch) / "config.json").read_text())
    text = config.get("text_config", config)
    text.update(spec.config)
    kinds = text.get("layer_types") or ()
    if {"linear_attention", "full_attention"} <= set(kinds):
        # The published key, from which SGLang counts; transformers writes the list alone.
        text["full_attention_interval"] = kinds.index("full_attention") + 1
    last = text["num_hidden_layers"] - 1
    if spec.draft == "mtp":
        tensors |= weights.mtp_shapes(tensors, last)
    elif spec.draft == "after_main":
        tensors |= weights.nextn_shapes(tensors, last)
    tensors = {n: weights.random_tensor(n, t, seed) for n, t in tensors.items()}
    if spec.draft == "after_main":
        weights.tie_nextn(tensors, last)
    if spec.layout == "stacked":
        tensors = weights.stack(tensors)
    # Published checkpoints keep the correction bias in float32, whatever the rest is in.
    kept = "e_score_correction_bias"
    tensors = {n: t if n.endswith(kept) else t.to(getattr(torch, dtype)) for n, t in tensors.items()}
    folder.mkdir(parents=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    _write_json(folder / "config.json", config)
    # No sampling defaults: engines would take them over, and greedy runs would depend on this file.
    _write_json(folder / "generation_config.json", {"eos_token_id": 2, "pad_token_id": 0})
    _tokenizer(folder)
    return folder


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def _tokenizer(folder: Path) -> None:
    """Write a tokenizer of whole words w0, w1, ...: enough for an engine that insists on one."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>"]
    words = special + [f"w{i}" for i in range(models.VOCAB - len(special))]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=1024,
    ).save_pretrained(folder)
