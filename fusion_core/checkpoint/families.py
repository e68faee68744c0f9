"""The model families that can fuse, as data: what differs between them stands here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scoring = Literal["softmax", "sigmoid"]
SharedWeight = Literal["sigmoid_gate", "constant"]
Role = Literal["main", "draft"]


@dataclass(frozen=True)
class FamilySpec:
    """Facts of one family, in the terms of its Hugging Face ``config.json`` and tensor names.

    Args:
        name: the family's short name in reports.
        model_types: ``model_type`` values of the top-level config that name this family.
        scoring: how router logits become expert scores.
        shared_weight: weight of the shared expert: sigmoid of its own gate, or constantly 1.
        num_experts_key, top_k_key: config keys of E and k.
        shared_size_key: config key of the shared expert's intermediate width, if it has one.
        num_shared_key: config key of the shared expert's width in routed widths, if it has one.
        renormalize_default: ``norm_topk_prob`` where the config does not name it.
        grouped_routing: the family reads ``n_group``, ``topk_group`` and ``routed_scaling_factor``.
        sparse_step: layers are sparse by ``decoder_sparse_step`` and ``mlp_only_layers``.
        first_dense_key: config key of the number of leading dense layers, if any.
        shared_module: the shared expert's module name below ``mlp``.
        layer_prefixes: prefixes of decoder layers in checkpoints, longest first.
        draft_prefix: prefix of the MTP draft's layers where it has one of its own.
        draft_count_keys: config keys of the number of draft layers, first one present wins.
        draft_after_main: the draft's layers follow the main ones under the same prefix.
    """

    name: str
    model_types: tuple[str, ...]
    scoring: Scoring
    shared_weight: SharedWeight
    num_experts_key: str
    shared_module: str
    layer_prefixes: tuple[str, ...] = ("model.layers.",)
    top_k_key: str = "num_experts_per_tok"
    shared_size_key: str | None = None
    num_shared_key: str | None = None
    renormalize_default: bool = True
    grouped_routing: bool = False
    sparse_step: bool = False
    first_dense_key: str | None = None
    draft_prefix: str | None = None
    draft_count_keys: tuple[str, ...] = ()
    draft_after_main: bool = False


FAMILIES: tuple[FamilySpec, ...] = (
    FamilySpec(
        name="qwen2_moe",
        model_types=("qwen2_moe",),
        scoring="softmax",
        shared_weight="sigmoid_gate",
        num_experts_key="num_experts",
        shared_module="shared_expert",
        shared_size_key="shared_expert_intermediate_size",
        renormalize_default=False,
        sparse_step=True,
    ),
    FamilySpec(
        name="qwen3_next",
        model_types=("qwen3_next",),
        scoring="softmax",
        shared_weight="sigmoid_gate",
        num_experts_key="num_experts",
        shared_module="shared_expert",
        shared_size_key="shared_expert_intermediate_size",
        sparse_step=True,
        draft_prefix="mtp.layers.",
        draft_count_keys=("num_nextn_predict_layers",),
    ),
    FamilySpec(
        name="qwen3_5_moe",
        model_types=("qwen3_5_moe", "qwen3_5_moe_text"),
        scoring="softmax",
        shared_weight="sigmoid_gate",
        num_experts_key="num_experts",
        shared_module="shared_expert",
        shared_size_key="shared_expert_intermediate_size",
        # Text-only exports keep the multimodal prefix now and then; both are read.
        layer_prefixes=("model.language_model.layers.", "model.layers."),
        draft_prefix="mtp.layers.",
        draft_count_keys=("mtp_num_hidden_layers",),
    ),
    FamilySpec(
        name="glm4_moe",
        model_types=("glm4_moe",),
        scoring="sigmoid",
        shared_weight="constant",
        num_experts_key="n_routed_experts",
        shared_module="shared_experts",
        num_shared_key="n_shared_experts",
        grouped_routing=True,
        first_dense_key="first_k_dense_replace",
        draft_count_keys=("num_nextn_predict_layers",),
        draft_after_main=True,
    ),
)


def family_of(model_type: str) -> FamilySpec | None:
    """The family that a top-level ``model_type`` names, or None."""
    return next((f for f in FAMILIES if model_type in f.model_types), None)
