"""Tests only: stands in for SGLang's kernel package, of which no build for CPUs is on the package index.

Linear attention is done in plain torch (mamba.py); every other name exists and refuses to be called, so that
SGLang takes its own paths in torch. REPLACED lists the operations of mamba.py that ran in this process: a
verification that used them says so.
"""

__version__ = "0+tests"
REPLACED = set()


def replacement(function):
    """Note when a stand-in runs."""
    import functools

    @functools.wraps(function)
    def noted(*args, **kwargs):
        REPLACED.add(function.__name__)
        return function(*args, **kwargs)

    return noted


def _one_core(module):
    # It asks CUDA for the number of multiprocessors, which only sets how a kernel is cut up.
    module._get_sm_count = lambda device: 1


def _leave_out(module):
    # Whole experts spread over processes: SGLang's map gives -1 to those of others, which this path counts.
    honest = module.moe_forward_native

    def moe_forward_native(layer, x, topk_output, config):
        weights, ids, logits = topk_output
        if not (ids < 0).any():
            return honest(layer, x, topk_output, config)
        REPLACED.add("moe_forward_native")
        out = x.new_zeros(x.shape)
        # A column at a time: a token has each expert once, and others' not at all.
        for one in range(ids.shape[1]):
            here = ids[:, one] >= 0
            if here.any():
                chosen = type(topk_output)(
                    weights[here, one : one + 1], ids[here, one : one + 1], logits[here]
                )
                out[here] += honest(layer, x[here], chosen, config)
        return out

    module.moe_forward_native = moe_forward_native


def _known(spread):
    spread.LEAVE_OUT |= {"cpu"}


def _prepare():
    import os

    import wrapt

    if os.environ.get("FSE_PATCH_TEST_LEAVE_OUT"):
        wrapt.register_post_import_hook(_leave_out, "sglang.srt.layers.moe.fused_moe_native")
        wrapt.register_post_import_hook(_known, "fse_patch.adapters.sglang.spread")

    wrapt.register_post_import_hook(_one_core, "sglang.kernels.ops.attention.fla.layernorm_gated")


_prepare()

# Before __getattr__ exists: it would answer for the submodule.
from . import mamba  # noqa: E402, F401


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name}: there is no such kernel on this machine")

    return refuse
