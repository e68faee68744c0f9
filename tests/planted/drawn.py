"""Randomly drawn sizes and routing of one MoE layer, small enough for the engines' CPU kernels."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import tiny_checkpoints
from checkpoints import models

SEEDS = range(24)


@dataclass(frozen=True)
class Drawn:
    """One model: sizes, and how its family routes."""

    family: str
    experts: int
    top_k: int
    slots: int
    hidden: int
    width: int
    renormalize: bool
    scale: float
    groups: int
    top_groups: int

    @property
    def name(self) -> str:
        parts = [f"E{self.experts}", f"k{self.top_k}", f"S{self.slots}", f"H{self.hidden}", f"I{self.width}"]
        parts += ["renorm"] if self.renormalize else []
        parts += [f"x{self.scale}"] if self.scale != 1.0 else []
        parts += [f"g{self.top_groups}of{self.groups}"] if self.groups > 1 else []
        return "-".join([self.family, *parts])

    def recipe(self) -> tiny_checkpoints.Recipe:
        """Its checkpoint."""
        glm = self.family == "glm4_moe"
        return tiny_checkpoints.Recipe(
            self._glm if glm else self._qwen,
            config={"num_nextn_predict_layers": 0} if glm else {},
            family=self.family,
        )

    def _sizes(self) -> dict[str, Any]:
        sizes = {"hidden_size": self.hidden, "moe_intermediate_size": self.width, "intermediate_size": 128}
        return {
            **models.COMMON,
            **sizes,
            "num_experts_per_tok": self.top_k,
            "norm_topk_prob": self.renormalize,
        }

    def _qwen(self) -> Any:
        from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

        sizes = {"num_experts": self.experts, "decoder_sparse_step": 1, **self._sizes()}
        sizes["shared_expert_intermediate_size"] = self.slots * self.width
        if self.family == "qwen2_moe":
            return Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes))
        return Qwen3NextForCausalLM(Qwen3NextConfig(**sizes, **models.LINEAR_ATTENTION))

    def _glm(self) -> Any:
        from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

        return Glm4MoeForCausalLM(
            Glm4MoeConfig(
                **self._sizes(),
                head_dim=32,
                n_routed_experts=self.experts,
                n_shared_experts=self.slots,
                routed_scaling_factor=self.scale,
                n_group=self.groups,
                topk_group=self.top_groups,
                first_k_dense_replace=1,
                use_qk_norm=True,
                num_nextn_predict_layers=0,
            )
        )


def draw(seed: int) -> Drawn:
    """The model of a seed."""
    rng = random.Random(seed)
    family = rng.choice(["qwen2_moe", "qwen2_moe", "glm4_moe", "glm4_moe", "qwen3_next"])
    glm = family == "glm4_moe"
    groups = rng.choice([1, 1, 2, 4]) if glm else 1
    experts = groups * rng.randint(2, 6) if groups > 1 else rng.randint(3, 24)
    top_groups = rng.randint(1, groups)
    return Drawn(
        family=family,
        experts=experts,
        top_k=rng.randint(1, min(8, experts * top_groups // groups)),
        slots=1 if family == "qwen3_next" else rng.choice([1, 1, 2, 3, 5, 8]),
        hidden=rng.choice([64, 96, 128]),
        width=rng.choice([32, 64, 96]),
        renormalize=True if glm else rng.random() < 0.5,
        scale=rng.choice([1.0, 1.8, 2.5, 16.0]) if glm else 1.0,
        groups=groups,
        top_groups=top_groups,
    )
