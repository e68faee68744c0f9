"""The experts of few tokens over k+S slots, each chosen expert's weights read once, whatever the routing.

w13: blocks walk (expert, tile of rows) and multiply the tile by all tokens that chose the expert. w2: a block
owns rows of the output for all tokens, and walks the experts in ascending order. Tokens are columns of a
matrix product, and no partial sums are added up in memory.

The shared expert is in the tensors of the routed ones, or lies where it is, in a format of its own.

4-bit weights are multiplied in the states' dtype, which holds their numbers exactly; scales come after that.

FP8 weights (e4m3) are multiplied as float16, which holds them exactly, and so are the states: times a power
of two for each token, by which the largest of them fits. Inner states are kept times `INNER`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton

from .expert_weights import ExpertWeights, slots_of
from .experts_once_kernels import ALIKE, MERGED, OTHER, w2_kernel, w13_kernel
from .fitting import launch_fitting
from .launch import options
from .once_tiles import Tile, tiles_of
from .weight_format import Format, fits, format_of
from .work_list import Work, WorkList, work_list


def experts_once(
    hidden_states: torch.Tensor,
    routed: ExpertWeights,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    shared: ExpertWeights | None = None,
    tiles: tuple[Tile, Tile] | None = None,
) -> torch.Tensor:
    """Compute the fused layer's output: sum over j of weight_j · w2_j (SiLU(w1_j x) · (w3_j x)).

    Args:
        hidden_states: [num_tokens, H], bfloat16 or float16; at most `MOST_TOKENS` rows. Weights that are not
            FP8 have this dtype.
        routed: of E experts; with the shared slots after them where ``shared`` is None.
        topk_weights: [num_tokens, k + S] float32; topk_ids: the same shape, int32. The ids of a token differ;
            below 0 there is no expert. Ids from E on are slots of the shared expert.
        shared: the shared expert by itself, E = 1, in a format of its own; each token has all its slots,
            I of its columns each: `slots_of`.

    Returns:
        [num_tokens, H] in the dtype of ``hidden_states``.

    Raises:
        ValueError: the weights do not fit each other.
    """
    states = hidden_states.contiguous()
    passed = _Pass(routed, shared, topk_weights)
    first, second = tiles or tiles_of(routed, shared, len(states))
    work = work_list(topk_ids, passed.experts, second.tokens, states if passed.fp8 else None)
    inner = torch.empty(topk_ids.numel(), routed.width, dtype=torch.int16, device=states.device)
    output = torch.empty_like(states)
    launch_fitting(
        lambda tile: passed.launch_w13(states, work, inner, tile),
        first,
        lambda: passed.what("w13", work.whole),
    )
    launch_fitting(
        lambda tile: passed.launch_w2(inner, work.parts, output, tile),
        second,
        lambda: passed.what("w2", work.parts),
    )
    return output


class _Pass:
    """The weights of one pass, and what its two kernels are told of them."""

    def __init__(
        self, routed: ExpertWeights, shared: ExpertWeights | None, topk_weights: torch.Tensor
    ) -> None:
        if shared is not None and (shared.count, shared.hidden) != (1, routed.hidden):
            raise ValueError(f"w2 of the shared expert is {list(shared.w2.shape)}")
        self.routed, self.shared, self.topk_weights = routed, shared, topk_weights
        self.width, self.hidden = routed.width, routed.hidden
        self.slots = 0 if shared is None else slots_of(shared, self.width)
        self.experts = routed.count + self.slots
        # What stands in the place of weights that are not there.
        self.other = routed if shared is None else shared
        self.fp8 = any(weights.scales is not None for weights in (routed, self.other))
        self.int4 = any(weights.int4 is not None for weights in (routed, self.other))

    def what(self, name: str, listed: WorkList) -> tuple[object, ...]:
        """Return what makes a kernel another one, beside its tile."""
        formats = (format_of(weights, name) for weights in (self.routed, self.other))
        sizes = (self.width, self.other.width, self.hidden, self.slots, listed.columns, len(listed.count))
        return (name, self.topk_weights.device, *formats, *sizes)

    def launch_w13(self, states: torch.Tensor, work: Work, inner: torch.Tensor, tile: Tile) -> None:
        """Write weight · SiLU(w1 x) · (w3 x) of every (token, slot) pair into ``inner`` [pairs, I]."""
        listed, fitted = work.whole, work.fitted
        w13_kernel[(_processors(states.device) * tile.blocks,)](
            states,
            *((states, states) if fitted is None else (fitted.states, fitted.factors)),
            *self._tensors("w13"),
            listed.count,
            listed.experts,
            listed.rows,
            self.topk_weights,
            inner,
            len(states),
            self.routed.count,
            num_warps=tile.warps,
            **self._common("w13", self.hidden, states, listed, tile),
        )

    def launch_w2(self, inner: torch.Tensor, listed: WorkList, output: torch.Tensor, tile: Tile) -> None:
        """Write the sum over a token's slots of w2 · inner into ``output`` [num_tokens, H]."""
        w2_kernel[(triton.cdiv(self.hidden, tile.rows), len(listed.count))](
            inner,
            *self._tensors("w2"),
            listed.count,
            listed.experts,
            listed.rows,
            output,
            len(output),
            self.routed.count,
            PLACES=listed.experts.shape[1],
            TOKENS=listed.tokens if len(listed.count) > 1 else listed.columns,
            num_warps=tile.warps * tile.experts,
            **self._common("w2", self.width, output, listed, tile),
        )

    def _tensors(self, name: str) -> list[torch.Tensor]:
        """Return weights, scales and zero points of the routed experts and of the shared one."""
        tensors = []
        for weights in (self.routed, self.other):
            weight: torch.Tensor = getattr(weights, name)
            beside = weights.scales or weights.int4
            scale = weight if beside is None else getattr(beside, name)
            zeros = None if weights.int4 is None else getattr(weights.int4, f"{name}_zeros")
            tensors += [weight, scale, weight if zeros is None else zeros]
        return tensors

    def _common(
        self, name: str, columns: int, states: torch.Tensor, listed: WorkList, tile: Tile
    ) -> dict[str, Any]:
        """Return what both kernels are told; a matrix of a routed expert has ``columns``."""
        formats: list[Format] = [format_of(weights, name) for weights in (self.routed, self.other)]
        ways = [tile, tile.shared or tile]
        for one, way in zip(formats, ways, strict=True):
            fits(one, tile.rows, way.depth, any(each.in_tiles for each in formats))
        alike = not self.int4 and formats[0][:3] == formats[1][:3]
        where = MERGED if self.shared is None else ALIKE if alike else OTHER
        return {
            "HIDDEN": self.hidden,
            "WIDTH": self.width,
            "SHARED_WIDTH": self.other.width,
            "ROWS": tile.rows,
            "SHARED": where.value,
            "STEPS": ways[0].steps(columns),
            "SHARED_STEPS": ways[1].steps(columns),
            "FORMAT": formats[0],
            "SHARED_FORMAT": formats[1],
            "COLUMNS": listed.columns,
            # Triton's interpreter multiplies bfloat16 as integers.
            "WIDE": not states.is_cuda,
            **options(states),
        }


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
