"""Tests only: Qwen's gated delta-rule attention in float32 on the CPU engine, whose own kernels take bfloat16
alone.

Put this folder on PYTHONPATH: the dist-info beside this file makes the engine call ``install`` in every
process that it starts, workers included. bfloat16 still goes to the engine's kernels; only float32, which
they refuse, comes here. Plain torch, one token at a time: written to be right, not fast.
"""

MODULE = "vllm.model_executor.layers.mamba.ops.cpu.gdn_attention"


def install():
    """Plugin entry point. The patch waits until the engine imports the module, if ever it does."""
    import wrapt

    wrapt.register_post_import_hook(patch, MODULE)


def patch(module):
    """Replace the module's core; it looks the name up when it registers the custom operator."""
    import torch

    original = module.cpu_gdn_attention_core
    if getattr(original, "fse_patch_float32", False):
        return

    # The operator's schema is read from these annotations, so they must be types and not strings.
    def cpu_gdn_attention_core(
        mixed_qkv: torch.Tensor,
        b: torch.Tensor,
        a: torch.Tensor,
        core_attn_out: torch.Tensor,
        layer_name: module.LayerNameType,
    ) -> None:
        if mixed_qkv.dtype != torch.float32:
            original(mixed_qkv, b, a, core_attn_out, layer_name)
            return
        context = module.get_forward_context()
        if context.attn_metadata is None:
            return  # a dry run for memory profiling
        layer = context.no_compile_layers[module._resolve_layer_name(layer_name)]
        meta = context.attn_metadata[layer.prefix]
        conv = layer.kv_cache[0]
        if not module.is_conv_state_dim_first():
            conv = conv.transpose(-1, -2)
        for tokens, sequence in sequences(meta, layer.conv1d.weight.size(-1), conv, layer.kv_cache[1]):
            core_attn_out[tokens] = attend(layer, sequence, mixed_qkv[tokens], a[tokens], b[tokens])

    cpu_gdn_attention_core.fse_patch_float32 = True
    module.cpu_gdn_attention_core = cpu_gdn_attention_core
    leave_plain(getattr(module, "ops", None))


def leave_plain(ops):
    """Keep float32 weights of convolutions as they are: up to 0.28 all are packed where there is AMX."""
    import torch

    pack = getattr(ops, "causal_conv1d_weight_pack", None)
    if pack is not None:
        ops.causal_conv1d_weight_pack = lambda weight: (
            pack(weight) if weight.dtype == torch.bfloat16 else weight
        )


class Sequence:
    """Where one sequence finds its state and where it leaves it.

    conv is its convolution buffer [channels, length]; offset is where its history starts there. first is the
    recurrent state's slot to start from, or None to start from zero. slots takes the state after each token
    (speculative: a rejected token's state is stepped back over) or, with a single slot, after the last one.
    """

    def __init__(self, states, conv, width, first, slots, offset=0, speculative=False):
        self.states, self.conv, self.width, self.first = states, conv, width, first
        self.slots, self.offset, self.speculative = slots, offset, speculative

    def convolution_input(self, x):
        """History and new inputs [channels, width - 1 + tokens]; readies the buffer for the next step."""
        import torch

        keep = self.width - 1
        if self.first is None:
            history = x.new_zeros(x.size(0), keep)
        else:
            history = self.conv[:, self.offset : self.offset + keep].clone()
        whole = torch.cat([history, x], dim=1)
        if self.speculative:
            # The buffer rolls: all of it that may still be history, then the new inputs at its end.
            length = self.conv.size(1)
            older = self.conv[:, self.offset + 1 : self.offset + 1 + length - x.size(1)].clone()
            self.conv.copy_(torch.cat([older, x], dim=1))
        else:
            self.conv[:, :keep] = whole[:, -keep:]
        return whole

    def store(self, step, last, state):
        if self.speculative:
            self.states[self.slots[step]] = state
        elif last:
            self.states[self.slots[0]] = state


def sequences(meta, width, conv, states):
    """(token indices, Sequence) of every sequence in the batch."""
    import torch

    spec = meta.num_spec_decodes if meta.spec_sequence_masks is not None else 0
    if spec:
        starts = meta.spec_query_start_loc.tolist()
        table = meta.spec_state_indices_tensor.tolist()
        accepted = meta.num_accepted_tokens.tolist()
        mixed = meta.num_prefills + meta.num_decodes > 0
        where = meta.spec_token_indx if mixed else torch.arange(starts[spec])
        for i in range(spec):
            offset = accepted[i] - 1
            sequence = Sequence(states, conv[table[i][0]], width, table[i][offset], table[i], offset, True)
            yield where[starts[i] : starts[i + 1]], sequence
        if not mixed:
            return
        # Beside speculative ones the engine counts every other sequence as a prefill.
        starts, slots = meta.prefill_query_start_loc.tolist(), meta.prefill_state_indices.tolist()
        known, where = meta.has_initial_state.tolist(), meta.non_spec_token_indx
    else:
        count = meta.num_decodes + meta.num_prefills
        starts = meta.non_spec_query_start_loc.tolist()[: count + 1]
        slots = meta.non_spec_state_indices_tensor.tolist()[:count]
        # Only prefills can lack a state, and without prefills there is no such tensor.
        known = [True] * count if meta.has_initial_state is None else meta.has_initial_state.tolist()
        known[: meta.num_decodes] = [True] * meta.num_decodes
        where = torch.arange(starts[-1])
    for i in range(len(starts) - 1):
        first = slots[i] if known[i] else None
        yield where[starts[i] : starts[i + 1]], Sequence(states, conv[slots[i]], width, first, [slots[i]])


def attend(layer, sequence, x, a, b):
    """Outputs [tokens, value heads, value dim] of one sequence's new tokens."""
    import torch
    import torch.nn.functional as F

    weight = getattr(layer.conv1d, "_cpu_unpacked_conv_weight", None)
    weight = layer.conv1d.weight if weight is None else weight
    channels, width = x.size(1), sequence.width
    mixed = sequence.convolution_input(x.t())
    mixed = F.conv1d(mixed[None], weight.view(channels, 1, width), layer.conv1d.bias, groups=channels)[0]
    if layer.activation in ("silu", "swish"):
        mixed = F.silu(mixed)
    query, key, value = (t.squeeze(0) for t in layer.rearrange_mixed_qkv(mixed.t().contiguous()))
    repeat = value.size(1) // query.size(1)
    query = unit(query).repeat_interleave(repeat, 1) * query.size(-1) ** -0.5
    key = unit(key).repeat_interleave(repeat, 1)
    decay = (-layer.A_log.float().exp() * F.softplus(a.float() + layer.dt_bias.float())).exp()
    beta = b.float().sigmoid()
    heads, value_dim, key_dim = value.size(1), value.size(-1), key.size(-1)
    if sequence.first is None:
        state = torch.zeros(heads, value_dim, key_dim)
    else:
        state = sequence.states[sequence.first].float()
    out = torch.empty_like(value)
    for t in range(x.size(0)):
        state = state * decay[t][:, None, None]
        # The delta rule: what the memory holds under this key is corrected towards the new value.
        error = (value[t] - torch.einsum("hvk,hk->hv", state, key[t])) * beta[t][:, None]
        state = state + torch.einsum("hv,hk->hvk", error, key[t])
        out[t] = torch.einsum("hvk,hk->hv", state, query[t])
        sequence.store(t, t == x.size(0) - 1, state)
    return out


def unit(x):
    return x * ((x * x).sum(-1, keepdim=True) + 1e-6).rsqrt()
