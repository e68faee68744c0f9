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
    """Work of one pass, in lists of so many tokens each.

    Args:
        tokens: in a list; the last one may have fewer.
        count: [lists] int32, how many experts there are in each: D.
        experts: [lists, places] int32; the first D are the experts, ascending: shared slots last.
        rows: [lists, places, columns] int32: of an expert and a token of the list the number of the (token,
            slot) pair, t * (k + S) + j; -1 where the token did not choose it.
    """

    tokens: int

    count: torch.Tensor
    experts: torch.Tensor
    rows: torch.Tensor

    @property
    def columns(self) -> int:
        """Return the number of tokens that there is room for."""
        return self.rows.shape[2]


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


def work_list(topk_ids: torch.Tensor, num_experts: int, tokens: int = 0) -> WorkList:
    """List the experts that ``topk_ids`` name.

    Args:
        topk_ids: [num_tokens, k + S] int32; the ids of a token differ.
        num_experts: E + S.
        tokens: of each list; 0: one list of all.
    """
    total, slots = topk_ids.shape
    tokens = tokens or total
    lists, columns = triton.cdiv(total, tokens), columns_for(tokens)
    places = min(tokens * slots, num_experts)
    made = torch.empty(lists * (1 + places * (1 + columns)), dtype=torch.int32, device=topk_ids.device)
    count, experts, rows = made.split([lists, lists * places, lists * places * columns])
    listed = WorkList(tokens, count, experts.view(lists, places), rows.view(lists, places, columns))
    _work_list[(lists,)](
        topk_ids,
        listed.count,
        listed.experts,
        listed.rows,
        total * slots,
        PAIRS=tokens * slots,
        SLOTS=slots,
        TOTAL=num_experts,
        COLUMNS=columns,
        PLACES=places,
        PAIRS_P2=triton.next_power_of_2(tokens * slots),
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
    ALL_PAIRS,
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
    number = tl.program_id(0)
    experts_ptr += number * PLACES
    rows_ptr += number * PLACES * COLUMNS
    offs_p = tl.arange(0, PAIRS_P2)
    pair = number * PAIRS + offs_p
    mask_p = (offs_p < PAIRS) & (pair < ALL_PAIRS)
    expert = tl.load(ids_ptr + pair, mask=mask_p, other=TOTAL)
    offs_e = tl.arange(0, TOTAL_P2)
    used = (tl.histogram(expert, TOTAL_P2) > 0) & (offs_e < TOTAL)
    place = tl.cumsum(used.to(tl.int32), 0) - 1
    tl.store(experts_ptr + place, offs_e, mask=used)
    tl.store(count_ptr + number, tl.sum(used.to(tl.int32), 0))
    offs_r = tl.arange(0, ROWS_P2)
    tl.store(rows_ptr + offs_r, -1, mask=offs_r < PLACES * COLUMNS)
    # Rows are cleared by other threads than those that fill them.
    tl.debug_barrier()
    at = tl.gather(place, expert, 0)
    tl.store(rows_ptr + at * COLUMNS + offs_p // SLOTS, pair, mask=mask_p)
