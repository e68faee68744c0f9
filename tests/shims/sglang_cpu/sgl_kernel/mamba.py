"""Gated delta-rule attention of Qwen3-Next and Qwen3.5 in plain torch, float32 inside, one token at a time.

Written to be right, not fast: signatures and state layouts are those that SGLang's CPU backend calls with.
conv_states is [slots, channels, width - 1]; recurrent states are [slots, value heads, value dim, key dim].
"""

import torch
import torch.nn.functional as F

from . import replacement


def _convolve(window, weight, bias, activation):
    """Depthwise convolution of [channels, width - 1 + n] to [channels, n]."""
    bias = None if bias is None else bias.float()
    out = F.conv1d(window[None].float(), weight[:, None].float(), bias, groups=weight.size(0))[0]
    return F.silu(out) if activation in ("silu", "swish") else out


@replacement
def causal_conv1d_fn_cpu(
    x,
    weight,
    bias,
    activation,
    conv_states,
    has_initial_state,
    cache_indices,
    query_start_loc,
    seq_lens_cpu,
):
    out, keep, start = torch.empty_like(x), weight.size(1) - 1, 0
    for sequence, length in enumerate(map(int, seq_lens_cpu)):
        state = conv_states[int(cache_indices[sequence])]
        known = bool(has_initial_state[sequence])
        history = state.to(x.dtype) if known else x.new_zeros(x.size(0), keep)
        tokens = slice(start, start + length)
        window = torch.cat([history, x[:, tokens]], dim=1)
        out[:, tokens] = _convolve(window, weight, bias, activation)
        state.copy_(window[:, -keep:])
        start += length
    return out


@replacement
def causal_conv1d_update_cpu(x, conv_states, weight, bias, activation, conv_state_indices):
    out = torch.zeros_like(x)
    for row, slot in enumerate(map(int, conv_state_indices)):
        if slot >= 0:  # padding has no state
            window = torch.cat([conv_states[slot].to(x.dtype), x[row][:, None]], dim=1)
            out[row] = _convolve(window, weight, bias, activation)[:, 0]
            conv_states[slot].copy_(window[:, 1:])
    return out


def _unit(x):
    return x * ((x * x).sum(-1, keepdim=True) + 1e-6).rsqrt()


def _gates(A_log, a, b, dt_bias):
    """Logarithm of the decay, and the step size."""
    return -A_log.float().exp() * F.softplus(a.float() + dt_bias.float()), b.float().sigmoid()


def _delta_rule(q, k, v, log_decay, beta, states, slots, starts, normalise):
    """Run [1, tokens, heads, dim] through the recurrence; states are updated in place."""
    query, key, value = (t[0].float() for t in (q, k, v))
    if normalise:
        query, key = _unit(query), _unit(key)
    repeat = value.size(1) // query.size(1)
    query = query.repeat_interleave(repeat, 1) * query.size(-1) ** -0.5
    key = key.repeat_interleave(repeat, 1)
    decay, step = log_decay[0].float().exp(), beta[0].float()
    out = torch.zeros_like(v)
    starts = [int(s) for s in starts]
    for slot, first, end in zip(map(int, slots), starts, starts[1:], strict=False):
        if slot < 0:
            continue
        state = states[slot].float()
        for t in range(first, end):
            state = state * decay[t][:, None, None]
            # What the memory holds under this key is corrected towards the new value.
            error = (value[t] - torch.einsum("hvk,hk->hv", state, key[t])) * step[t][:, None]
            state = state + torch.einsum("hv,hk->hvk", error, key[t])
            out[0, t] = torch.einsum("hvk,hk->hv", state, query[t])
        states[slot] = state.to(states.dtype)
    return out


@replacement
def chunk_gated_delta_rule_cpu(
    q,
    k,
    v,
    g,
    beta,
    initial_state,
    cu_seqlens,
    head_first,
    use_qk_l2norm_in_kernel,
    initial_state_indices,
):
    assert not head_first
    out = _delta_rule(
        q, k, v, g, beta, initial_state, initial_state_indices, cu_seqlens, use_qk_l2norm_in_kernel
    )
    return out, None, None


@replacement
def fused_gdn_gating_cpu(A_log, a, b, dt_bias):
    log_decay, beta = _gates(A_log, a, b, dt_bias)
    return log_decay[None], beta[None]


@replacement
def fused_sigmoid_gating_delta_rule_update_cpu(
    *,
    A_log,
    dt_bias,
    q,
    k,
    v,
    a,
    b,
    initial_state_source,
    initial_state_indices,
    cu_seqlens,
    use_qk_l2norm_in_kernel,
    softplus_beta=1.0,
    softplus_threshold=20.0,
):
    assert (softplus_beta, softplus_threshold) == (1.0, 20.0)
    log_decay, beta = _gates(A_log, a, b, dt_bias)
    return _delta_rule(
        q,
        k,
        v,
        log_decay[None],
        beta[None],
        initial_state_source,
        initial_state_indices,
        cu_seqlens,
        use_qk_l2norm_in_kernel,
    )


@replacement
def fused_sigmoid_mul_cpu(x, gate, inplace=True):
    x = x if inplace else x.clone()  # 0.5.18 says which; later releases mean in place
    return x.mul_(gate.reshape(x.shape).float().sigmoid().to(x.dtype))


def _norm(x, weight, eps):
    x32 = x.float()
    scale = (x32.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (x32 * scale * (1 + weight.float())).to(x.dtype)


@replacement
def fused_qk_gemma_rmsnorm_cpu(q, k, q_weight, k_weight, eps, head_dim):
    return _norm(q.reshape(-1, head_dim), q_weight, eps), _norm(k.reshape(-1, head_dim), k_weight, eps)


@replacement
def fused_qk_gemma_rmsnorm_with_gate_cpu(q_gate, k, q_weight, k_weight, eps, head_dim, num_heads):
    q, gate = q_gate.reshape(q_gate.size(0), num_heads, 2 * head_dim).chunk(2, -1)
    query = _norm(q.reshape(-1, head_dim), q_weight, eps)
    return query, _norm(k.reshape(-1, head_dim), k_weight, eps), gate.contiguous()


@replacement
def fused_qkvzba_split_reshape_cat_contiguous_cpu(qkvz, ba, key_heads, value_heads, key_dim, value_dim):
    width = value_heads * value_dim
    qkv, z = qkvz.split([2 * key_heads * key_dim + width, width], -1)
    b, a = ba.split([value_heads, value_heads], -1)
    z = z.reshape(qkvz.size(0), value_heads, value_dim)
    return qkv.contiguous(), z, b.contiguous(), a.contiguous()


# Looked up there when the engine's modules are imported.
for _operation in (
    fused_gdn_gating_cpu,
    fused_sigmoid_gating_delta_rule_update_cpu,
    fused_sigmoid_mul_cpu,
    fused_qk_gemma_rmsnorm_cpu,
    fused_qk_gemma_rmsnorm_with_gate_cpu,
    fused_qkvzba_split_reshape_cat_contiguous_cpu,
):
    setattr(torch.ops.sgl_kernel, _operation.__name__, _operation)
