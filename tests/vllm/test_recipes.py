"""Every recipe is a checkpoint that transformers loads: no tensor missing, none but a draft's left over."""

from __future__ import annotations

import pytest
import torch
from tiny_checkpoints import RECIPES, make


def _model_class(name: str):
    import transformers
    from transformers.models import qwen3_5_moe

    return getattr(transformers, name, None) or getattr(qwen3_5_moe, name)


@pytest.mark.parametrize("recipe", RECIPES)
def test_transformers_loads_it(tmp_path, recipe):
    from transformers import AutoConfig

    folder = make(recipe, tmp_path / recipe)
    config = AutoConfig.from_pretrained(folder)
    model, info = _model_class(config.architectures[0]).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    if RECIPES[recipe].draft == "none":
        assert not info["unexpected_keys"]
    with torch.no_grad():
        logits = model.eval()(torch.tensor([[5, 9, 77, 31, 200]]), use_cache=False).logits[0]
    # Logits that hardly differ would make every comparison of log-probabilities pass.
    assert logits.std() > 0.5


def test_the_same_bytes_each_time(tmp_path):
    one, two = (make("glm4_moe_mtp", tmp_path / n) / "model.safetensors" for n in "ab")
    assert one.read_bytes() == two.read_bytes()
    other = make("glm4_moe_mtp", tmp_path / "c", seed=1) / "model.safetensors"
    assert other.read_bytes() != one.read_bytes()
