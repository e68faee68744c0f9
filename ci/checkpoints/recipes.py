"""The recipes: which architecture, which config, which expert layout, with or without an MTP draft."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from . import models


@dataclass(frozen=True)
class Recipe:
    """One checkpoint.

    Args:
        build: gives the transformers model (its weights are replaced afterwards).
        layout: "per_expert" (one tensor an expert and projection) or "stacked" (3-D, all experts in one).
        draft: "none", "mtp" (own ``mtp.`` prefix) or "after_main" (layers numbered on after the main ones).
        dtype: the dtype a plain CPU engine can run it in; float32 needs a shim where this says bfloat16.
        config: keys added to config.json after saving (to its text_config where there is one).
        family: the fusible family's name, or None for a model that must stay stock.
        needs: the module of ``build`` that not every release of transformers has.
    """

    build: Callable[[], Any]
    layout: str = "per_expert"
    draft: str = "none"
    dtype: str = "float32"
    config: dict[str, Any] = field(default_factory=dict)
    family: str | None = None
    needs: str = "transformers"

    def can_be_made(self) -> bool:
        """Return whether this environment has what ``build`` needs."""
        try:
            return find_spec(self.needs) is not None
        except ModuleNotFoundError:  # a package above it
            return False


def _qwen3_5(build: Callable[[], Any], layout: str, draft: bool = False) -> Recipe:
    return Recipe(
        build,
        layout,
        "mtp" if draft else "none",
        "bfloat16",
        {"mtp_num_hidden_layers": 1} if draft else {"mtp_num_hidden_layers": 0},
        "qwen3_5_moe",
    )


def _glm(**changes: Any) -> Recipe:
    draft = "after_main" if changes.get("draft") else "none"
    # transformers names this key differently in its releases; engines read this one.
    config = {"num_nextn_predict_layers": changes.get("draft", 0)}
    return Recipe(lambda: models.glm4_moe(**changes), draft=draft, config=config, family="glm4_moe")


RECIPES: dict[str, Recipe] = {
    "qwen2_moe": Recipe(models.qwen2_moe, family="qwen2_moe"),
    "qwen2_moe_renorm": Recipe(lambda: models.qwen2_moe(renormalize=True), family="qwen2_moe"),
    "qwen2_moe_wide4": Recipe(lambda: models.qwen2_moe(shared_times=4, two_ranks=True), family="qwen2_moe"),
    "qwen2_moe_wide8": Recipe(lambda: models.qwen2_moe(shared_times=8), family="qwen2_moe"),
    "qwen3_next": Recipe(models.qwen3_next, dtype="bfloat16", family="qwen3_next"),
    "qwen3_next_mtp": Recipe(
        models.qwen3_next,
        draft="mtp",
        dtype="bfloat16",
        config={"num_nextn_predict_layers": 1},
        family="qwen3_next",
    ),
    "qwen3_5_text": _qwen3_5(models.qwen3_5_text, "per_expert"),
    "qwen3_5_text_3d": _qwen3_5(models.qwen3_5_text, "stacked"),
    "qwen3_5_vl": _qwen3_5(models.qwen3_5_vl, "per_expert"),
    "qwen3_5_vl_3d": _qwen3_5(models.qwen3_5_vl, "stacked"),
    "qwen3_5_mtp": _qwen3_5(models.qwen3_5_vl, "per_expert", draft=True),
    "qwen3_5_mtp_3d": _qwen3_5(models.qwen3_5_vl, "stacked", draft=True),
    # Stock vLLM on a CPU corrupts its heap when the draft of the text-only class has rotary sections. Text
    # positions are the same in every section, so the model is the same without them.
    "qwen3_5_text_mtp": _qwen3_5(lambda: models.qwen3_5_text(sections=False), "per_expert", draft=True),
    "glm4_moe": _glm(),
    "glm4_moe_scale": _glm(scale=2.5),
    "glm4_moe_shared2": _glm(shared=2),
    "glm4_moe_shared2_scale": _glm(shared=2, scale=2.5, two_ranks=True),
    "glm4_moe_grouped": _glm(scale=2.5, groups=4, top_groups=2),
    "glm4_moe_mtp": _glm(scale=2.5, draft=1),
    # Published configs have the key; this transformers class does not write it.
    "glm4v_moe": Recipe(models.glm4v_moe, config={"use_qk_norm": False}, family="glm4v_moe"),
    # Published configs have the key that engines read; this transformers class has another one for it.
    "glm4_moe_lite": Recipe(
        models.glm4_moe_lite, config={"first_k_dense_replace": 1}, family="glm4_moe_lite"
    ),
    # Inherits Qwen3-Next's block. To build and load only: on a CPU vLLM 0.32 stops in the first forward pass,
    # whose hyper-connections have no kernel but Triton's; earlier releases do not know the model.
    "qwen4_exp": Recipe(
        models.qwen4_exp, dtype="bfloat16", family="qwen4_exp", needs="transformers.models.qwen4_exp"
    ),
    "qwen3_moe": Recipe(models.qwen3_moe),
}
