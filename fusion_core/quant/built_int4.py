"""4-bit experts as an engine built them: what of it the kernels for few tokens do not read, and why.

A layout is not seen in the numbers: read wrongly, they are weights like others. So what can change it is
asked for by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..reasons import Reason

# dtypes of states that go with weights as the checkpoint has them; for 8 bits they are repacked.
SIXTEEN_BITS = ("bfloat16", "float16")


@dataclass(frozen=True)
class BuiltInt4:
    """What an engine says of one layer's 4-bit experts, after it packed them.

    Args:
        packing: by whom; "bytes" for plain ones.
        activations: dtype in which the engine's kernel multiplies.
        model: dtype of the states.
        scales: dtype of the scales.
        act_order: whether rows are sorted by g_idx.
        width: I of a rank, as built.
        group: columns that share a scale; 0: all.
        held: I as it is in memory; 0: not asked.
        biases: whether experts have biases.
        wrong: what the engine itself does wrongly, in words.
    """

    packing: Literal["marlin", "humming", "bytes"]
    activations: str
    model: str
    scales: str
    act_order: bool
    width: int
    group: int
    held: int = 0
    biases: bool = False
    wrong: str = ""


def refusal(built: BuiltInt4) -> Reason | None:
    """Return why the kernels for few tokens must not read these experts; None if they may."""
    if built.wrong:
        return Reason("upstream.wrong", built.wrong)
    if built.packing == "marlin" and 0 < built.width <= built.group:
        return Reason(
            "upstream.wrong",
            f"I of a rank is {built.width}, no more than a group of {built.group}: the engine itself "
            "brings the scales of w13 in Marlin's order for one group, though w13 has several, so that most "
            "rows get another row's scale (vLLM pull request 50196)",
        )
    if built.act_order:
        return Reason("quant.layout", "act-order: columns are sorted by g_idx, each expert's otherwise")
    if built.activations not in SIXTEEN_BITS:
        setting = {"marlin": "VLLM_MARLIN_INPUT_DTYPE", "humming": "VLLM_HUMMING_INPUT_QUANT_CONFIG"}
        return Reason(
            "quant.layout",
            f"{setting.get(built.packing, 'a setting')} has the engine multiply in {built.activations}, for "
            "which it packs weights otherwise",
        )
    if built.biases:
        return Reason("quant.layout", "experts have biases")
    if built.packing == "humming" and built.held not in (0, built.width):
        return Reason(
            "quant.layout",
            f"I of a rank is {built.width}, padded to {built.held}: Humming pads w13 as one matrix, so that "
            "its two halves are no more of one size",
        )
    for what, dtype in (("the engine's kernel multiplies", built.activations), ("scales are", built.scales)):
        if dtype != built.model:
            return Reason("quant.layout", f"{what} in {dtype}, states in {built.model}")
    return None
