"""What kernels/experts_once.py walks: the experts that some tokens chose, and who chose each. One launch.

Beside it, for FP8 weights, a power of two for each token by which its states fit float16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import begin, options

# Tokens that a list has room for: columns of a matrix product, which come in eights.
COLUMNS = (8, 16)
# More pairs are too many to compare each with all.
MOST_PAIRS = 256
WARPS = 8


@dataclass(frozen=True)
class WorkList:
    """Lists of experts, one for so many tokens each.

    Args:
        tokens: of a list; the last one may have fewer.
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


@dataclass(frozen=True)
class Work:
    """Work of one pass.

    Args:
        whole: one list, of all tokens.
        parts: lists for some of the tokens each; ``whole`` where they are no more than that.
        factors: [num_tokens] float32, a power of two each; None where nobody asked.
    """

    whole: WorkList
    parts: WorkList
    factors: torch.Tensor | None


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
    """Compute experts [D] and rows [D, columns] of one list, in torch."""
    experts = topk_ids.unique()
    rows = torch.full((len(experts), columns), -1, dtype=torch.int32, device=topk_ids.device)
    tokens, slots = topk_ids.shape
    for token in range(tokens):
        for slot in range(slots):
            place = int((experts == topk_ids[token, slot]).nonzero())
            rows[place, token] = token * slots + slot
    return experts.int(), rows


def factors_reference(states: torch.Tensor) -> torch.Tensor:
    """Compute `Work.factors`, in torch."""
    largest = states.float().abs().nan_to_num(0.0, float("inf")).amax(1)
    _, exponent = torch.frexp(largest)
    fine = (largest >= 2.0**-113) & largest.isfinite()
    return torch.where(fine, torch.exp2((14 - exponent).double()), 1.0).float()


def work_list(topk_ids: torch.Tensor, part: int = 0, states: torch.Tensor | None = None) -> Work:
    """List the experts that ``topk_ids`` name.

    Args:
        topk_ids: [num_tokens, k + S] int32; the ids of a token differ.
        part: tokens of each of the smaller lists; 0: none are wanted.
        states: [num_tokens, H], contiguous: make factors of these.

    Raises:
        ValueError: there are too many tokens or pairs.
    """
    tokens, slots = topk_ids.shape
    if tokens * slots > MOST_PAIRS:
        raise ValueError(f"{tokens} tokens of {slots} slots; a work list has room for {MOST_PAIRS} pairs")
    whole = _room(topk_ids, tokens)
    parts = _room(topk_ids, part) if 0 < part < tokens else whole
    factors = None if states is None else torch.empty(tokens, dtype=torch.float32, device=topk_ids.device)
    lists = 0 if parts is whole else len(parts.count)
    hidden = 0 if states is None else states.shape[1]
    _work[(1 + lists + (0 if states is None else tokens),)](
        topk_ids,
        *(whole.count, whole.experts, whole.rows),
        *(parts.count, parts.experts, parts.rows),
        topk_ids if states is None else states,
        topk_ids if factors is None else factors,
        tokens * slots,
        SLOTS=slots,
        **_sizes(whole, slots, "WHOLE"),
        **_sizes(parts, slots, "PART"),
        PART_PAIRS=parts.tokens * slots,
        LISTS=lists,
        HIDDEN=hidden,
        HIDDEN_P2=triton.next_power_of_2(max(hidden, 1)),
        num_warps=WARPS,
        **options(topk_ids),
    )
    return Work(whole, parts, factors)


def _room(topk_ids: torch.Tensor, tokens: int) -> WorkList:
    """Make room for lists of so many tokens each."""
    total, slots = topk_ids.shape
    lists, columns, places = triton.cdiv(total, tokens), columns_for(tokens), tokens * slots
    count, experts, rows = topk_ids.new_empty(lists * (1 + places * (1 + columns))).split(
        [lists, lists * places, lists * places * columns]
    )
    return WorkList(tokens, count, experts.view(lists, places), rows.view(lists, places, columns))


def _sizes(lists: WorkList, slots: int, name: str) -> dict[str, int]:
    return {
        f"{name}_COLUMNS": lists.columns,
        f"{name}_PLACES": lists.experts.shape[1],
        f"{name}_P2": triton.next_power_of_2(lists.tokens * slots),
    }


@triton.jit
def _work(
    ids_ptr,
    count_ptr,
    experts_ptr,
    rows_ptr,
    part_count_ptr,
    part_experts_ptr,
    part_rows_ptr,
    x_ptr,
    factors_ptr,
    ALL_PAIRS,
    SLOTS: tl.constexpr,
    WHOLE_COLUMNS: tl.constexpr,
    WHOLE_PLACES: tl.constexpr,
    WHOLE_P2: tl.constexpr,
    PART_COLUMNS: tl.constexpr,
    PART_PLACES: tl.constexpr,
    PART_P2: tl.constexpr,
    PART_PAIRS: tl.constexpr,
    LISTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_P2: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    number = tl.program_id(0)
    if number == 0:
        _list(
            ids_ptr, count_ptr, experts_ptr, rows_ptr, 0, ALL_PAIRS, SLOTS, WHOLE_COLUMNS, WHOLE_PLACES,
            WHOLE_P2,
        )  # fmt: skip
    elif number <= LISTS:
        part = number - 1
        first = part * PART_PAIRS
        _list(
            ids_ptr, part_count_ptr + part, part_experts_ptr + part * PART_PLACES,
            part_rows_ptr + part * PART_PLACES * PART_COLUMNS, first,
            tl.minimum(ALL_PAIRS, first + PART_PAIRS), SLOTS, PART_COLUMNS, PART_PLACES, PART_P2,
        )  # fmt: skip
    elif HIDDEN:
        _factor(x_ptr, factors_ptr, number - LISTS - 1, HIDDEN, HIDDEN_P2)


@triton.jit
def _list(
    ids_ptr,
    count_ptr,
    experts_ptr,
    rows_ptr,
    first,
    beyond,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PLACES: tl.constexpr,
    P2: tl.constexpr,
):
    """Make one list, of the pairs from ``first`` on and before ``beyond``."""
    NOBODY: tl.constexpr = 1 << 30
    CHUNK: tl.constexpr = 64 if P2 > 64 else P2
    offs = tl.arange(0, P2)
    pair = first + offs
    there = pair < beyond
    expert = tl.load(ids_ptr + pair, mask=there, other=NOBODY)
    place = tl.zeros([P2], tl.int32)
    count = 0
    # Some of the pairs at a time are compared with all: a whole square would not fit the registers.
    for start in tl.static_range(0, P2, CHUNK):
        some = first + start + tl.arange(0, CHUNK)
        other = tl.load(ids_ptr + some, mask=some < beyond, other=NOBODY)
        before = (expert[None, :] == other[:, None]) & (pair[None, :] < some[:, None])
        # Of each expert the first pair counts alone.
        new = (tl.max(before.to(tl.int32), 1) == 0) & (some < beyond)
        count += tl.sum(new.to(tl.int32), 0)
        place += tl.sum((new[:, None] & (other[:, None] < expert[None, :])).to(tl.int32), 0)
    tl.store(count_ptr, count)
    # Pairs of the same expert all write the same.
    tl.store(experts_ptr + place, expert, mask=there)
    for start in tl.static_range(0, PLACES * COLUMNS, P2):
        offs_r = start + offs
        tl.store(rows_ptr + offs_r, -1, mask=offs_r < PLACES * COLUMNS)
    # Rows are cleared by other threads than those that fill them.
    tl.debug_barrier()
    tl.store(rows_ptr + place * COLUMNS + offs // SLOTS, pair, mask=there)


@triton.jit
def _factor(x_ptr, factors_ptr, token, HIDDEN: tl.constexpr, HIDDEN_P2: tl.constexpr):
    """Write the factor of one token."""
    offs_k = tl.arange(0, HIDDEN_P2)
    x = tl.load(x_ptr + token.to(tl.int64) * HIDDEN + offs_k, mask=offs_k < HIDDEN, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), 0)
    # Of 2^e <= largest < 2^(e + 1) the exponent alone: the product is below 2^14. 1 for 0, infinity and NaN.
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    factor = ((254 + 13 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(factors_ptr + token, tl.where((exponent > 13) & (exponent < 255), factor, 1.0))
