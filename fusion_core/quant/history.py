"""Keys that tell how weights came about, or serve other modules: they say nothing of how experts are stored.

Listed by the tool that writes them. A tool also writes them into the configs of others' methods: auto-round
into those of GPTQ and AWQ, transformers GPTQ's into those of AWQ.
"""

from __future__ import annotations

from .claims import Doubt, Section, mapping, whole, word

# GPTQModel 1 to 7, AutoGPTQ, optimum, and the classes of transformers for GPTQ and AWQ.
GPTQ = frozenset({
    "quant_method", "method", "meta", "damp_percent", "damp_auto_increment", "static_groups",
    "true_sequential", "mse", "lm_head", "model_name_or_path", "model_file_base_name", "model_seqlen",
    "pad_token_id", "tokenizer", "dataset", "exllama_config", "max_input_length", "use_cuda_fp16",
    "use_exllama", "disable_exllama", "backend", "batch_size", "cache_block_outputs",
    "block_name_to_quantize", "module_name_preceding_first_block", "offload_to_disk", "failsafe",
    "act_group_aware", "version",
})  # fmt: skip
_ACTIVATIONS = frozenset({"act_bits", "act_group_size", "act_sym", "act_dynamic", "act_data_type"})
_STATIC = frozenset({
    "static_attention_dtype", "static_attention_granularity", "static_kv_dtype", "static_kv_granularity",
})  # fmt: skip
# auto-round, before and since its serialised config of 0.15.
AUTO_ROUND = _ACTIVATIONS | _STATIC | frozenset({
    "quant_method", "data_type", "amp", "autoround_version", "batch_size", "dataset",
    "enable_minmax_tuning", "enable_norm_bias_tuning", "enable_quanted_input", "gradient_accumulate_steps",
    "iters", "lr", "low_gpu_mem_usage", "minmax_lr", "model_name_or_path", "nsamples", "n_samples",
    "not_use_best_mse", "sampler", "scale_dtype", "seqlen", "seed", "train_bs", "backend", "super_bits",
    "super_group_size", "enable_alg_ext", "damp_percent", "desc_act", "true_sequential", "lm_head",
    "low_cpu_mem_usage", "dynamic_max_gap", "use_quant_input", "provider", "model_free", "rotation_config",
})  # fmt: skip
# What auto-round may change for a single module, beside bits, group size and symmetry.
AUTO_ROUND_SINGLE = _ACTIVATIONS | {
    "data_type", "scale_dtype", "super_bits", "super_group_size", "rotation_config",
}  # fmt: skip


def check_copy(section: Section) -> None:
    """Raise Doubt where `method`, GPTQModel's copy of `quant_method`, names another method than that."""
    if section.get("method") is not None and word(section, "method", "") != word(section, "quant_method", ""):
        raise Doubt(f"'method' is {section['method']!r}, 'quant_method' {section.get('quant_method')!r}")


def check_auto_round(section: Section) -> None:
    """Raise Doubt where auto-round did more than to quantise weights: to activations, or by a rotation."""
    if whole(section, "act_bits", 16) < 16:
        raise Doubt("quantised activations are not known")
    check_other_modules(section)


def check_other_modules(section: Section) -> None:
    """Raise Doubt where what auto-round did to attention and KV cache may reach further than that."""
    if mapping(section, "rotation_config"):
        raise Doubt("a rotation is not known")
    for key in ("static_attention_granularity", "static_kv_granularity"):
        # They do nothing without the dtype beside them, and speak of no expert with it.
        word(section, key, "tensor", {"tensor", "head"})
