"""The distinct experts that some tokens chose, and which of the tokens chose each: one launch, one block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import begin, options

# Tokens that a list has room for: columns of a matrix product, which come in eights.
COLUMNS = (8, 16)


@dataclass(frozen=True)
class WorkList:
    """Work of one pass.

    Args:
        count: [1] int32, how many experts there are: D.
        experts: [min(pairs, E + S)] int32; the first D are the experts, ascending: shared slots last.
        rows: [min(pairs, E + S), columns] int32: of token t and expert i the number of the (token, slot)
            pair, t * (k + S) + j; -1 where the token did not choose it.
    """

    count: torch.Tensor
    experts: torch.Tensor
    rows: torch.Tensor

    @property
    def columns(self) -> int:
        """Return the number of tokens that there is room for."""
        return self.rows.shape[1]


def columns_for(tokens: int) -> int:
    """Return the columns of a list for so many tokens.

    Raises:
        ValueError: there are more tokens than a list has room for.
    """
    for columns in COLUMNS:
        if tokens <= columns:
            return columns
    raise ValueError(f"{tokens} tokens; a work list has room for {COLUMNS[-1]}")


def reference(topk_ids: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute experts [D] and rows [D, columns] of `work_list`, in torch."""
    experts = topk_ids.unique()
    rows = torch.full((len(experts), columns), -1, dtype=torch.int32, device=topk_ids.device)
    tokens, slots = topk_ids.shape
    for token in range(tokens):
        for slot in range(slots):
            place = int((experts == topk_ids[token, slot]).nonzero())
            rows[place, token] = token * slots + slot
    return experts.int(), rows


def work_list(topk_ids: torch.Tensor, num_experts: int) -> WorkList:
    """List the experts that ``topk_ids`` name.

    Args:
        topk_ids: [num_tokens, k + S] int32; the ids of a token differ.
        num_experts: E + S.
    """
    tokens, slots = topk_ids.shape
    columns, pairs = columns_for(tokens), tokens * slots
    places = min(pairs, num_experts)
    made = torch.empty(1 + places + places * columns, dtype=torch.int32, device=topk_ids.device)
    listed = WorkList(made[:1], made[1 : 1 + places], made[1 + places :].view(places, columns))
    _work_list[(1,)](
        topk_ids,
        listed.count,
        listed.experts,
        listed.rows,
        PAIRS=pairs,
        SLOTS=slots,
        TOTAL=num_experts,
        COLUMNS=columns,
        PLACES=places,
        PAIRS_P2=triton.next_power_of_2(pairs),
        # One place more than there are experts: pairs that only pad the block go there.
        TOTAL_P2=triton.next_power_of_2(num_experts + 1),
        ROWS_P2=triton.next_power_of_2(places * columns),
        num_warps=4,
        **options(topk_ids),
    )
    return listed


@triton.jit
def _work_list(
    ids_ptr,
    count_ptr,
    experts_ptr,
    rows_ptr,
    PAIRS: tl.constexpr,
    SLOTS: tl.constexpr,
    TOTAL: tl.constexpr,
    COLUMNS: tl.constexpr,
    PLACES: tl.constexpr,
    PAIRS_P2: tl.constexpr,
    TOTAL_P2: tl.constexpr,
    ROWS_P2: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    pair = tl.arange(0, PAIRS_P2)
    mask_p = pair < PAIRS
    expert = tl.load(ids_ptr + pair, mask=mask_p, other=TOTAL)
    offs_e = tl.arange(0, TOTAL_P2)
    used = (tl.histogram(expert, TOTAL_P2) > 0) & (offs_e < TOTAL)
    place = tl.cumsum(used.to(tl.int32), 0) - 1
    tl.store(experts_ptr + place, offs_e, mask=used)
    tl.store(count_ptr, tl.sum(used.to(tl.int32), 0))
    offs_r = tl.arange(0, ROWS_P2)
    tl.store(rows_ptr + offs_r, -1, mask=offs_r < PLACES * COLUMNS)
    # Rows are cleared by other threads than those that fill them.
    tl.debug_barrier()
    at = tl.gather(place, expert, 0)
    tl.store(rows_ptr + at * COLUMNS + pair // SLOTS, pair, mask=mask_p)
