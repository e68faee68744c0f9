"""What no policy file can allow: the evidence has the last word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fse_patch.fusion_core.decision.decide import decide
from fse_patch.fusion_core.decision.policy_file import load_policy

from .checkpoints import Tensors, config_of, write_checkpoint
from .outcomes import code, stock
from .test_policy import BLOCK, FP8_BLOCK, NVFP4, PLAIN, SHARED_BF16

ALLOW_ALL = """\
version: 1
rules:
  - {id: allow-all, when: {}, fuse: true, why: control, source: none}
"""


@pytest.mark.parametrize(
    ("quant", "tensors", "reason"),
    [
        (BLOCK, FP8_BLOCK, "ok"),
        (None, SHARED_BF16, "quant.mixed"),
        (BLOCK, PLAIN, "quant.contradiction"),
        (BLOCK, None, "quant.unknown"),
        (NVFP4, PLAIN, "quant.unknown"),
        ({"quant_method": "brand-new"}, PLAIN, "quant.unknown"),
        (BLOCK | {"ignored_layers": ["model.layers.1.mlp.shared_expert"]}, FP8_BLOCK, "quant.contradiction"),
    ],
)
def test_no_policy_can_allow_what_the_evidence_forbids(
    tmp_path: Path, quant: dict[str, Any] | None, tensors: Tensors | None, reason: str
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(ALLOW_ALL)
    folder = write_checkpoint(tmp_path / "c", config_of("qwen3_next", quantization_config=quant), tensors)
    decision = decide(folder, "vllm", policy=load_policy(own))
    assert code(decision) == reason
    assert reason == "ok" or "allow-all would" in stock(decision).reason.detail
