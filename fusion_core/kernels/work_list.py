"""What kernels/experts_once.py walks: the experts that some tokens chose, and who chose each.

Beside it, for FP8 weights, the states of each token as float16, times a power of two by which they fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .launch import begin, options

# Tokens that a list has room for: columns of a matrix product, which come in eights.
COLUMNS = (8, 16)
MOST_TOKENS = COLUMNS[-1]
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
class Fitted:
    """States that fit float16.

    Args:
        states: [num_tokens, H] float16, the hidden states times the factors.
        factors: [num_tokens] float32, a power of two each.
    """

    states: torch.Tensor
    factors: torch.Tensor


@dataclass(frozen=True)
class Work:
    """Work of one pass.

    Args:
        whole: one list, of all tokens.
        parts: lists for some of the tokens each; ``whole`` where they are no more than that.
        fitted: None where nobody asked.
    """

    whole: WorkList
    parts: WorkList
    fitted: Fitted | None

    @property
    def lists(self) -> int:
        """Return the number of lists for some of the tokens."""
        return 0 if self.parts is self.whole else len(self.parts.count)


def columns_for(tokens: int) -> int:
    """Return the columns of a list for so many tokens.

    Raises:
        ValueError: there are more tokens than a list has room for.
    """
    for columns in COLUMNS:
        if tokens <= columns:
            return columns
    raise ValueError(f"{tokens} tokens; a work list has room for {MOST_TOKENS}")


def reference(topk_ids: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute experts [D] and rows [D, columns] of one list, in torch."""
    experts = topk_ids[topk_ids >= 0].unique()
    rows = torch.full((len(experts), columns), -1, dtype=torch.int32, device=topk_ids.device)
    tokens, slots = topk_ids.shape
    for token in range(tokens):
        for slot in range(slots):
            if topk_ids[token, slot] >= 0:
                place = int((experts == topk_ids[token, slot]).nonzero())
                rows[place, token] = token * slots + slot
    return experts.int(), rows


def fitted_reference(states: torch.Tensor) -> Fitted:
    """Compute `Work.fitted`, in torch."""
    largest = states.float().abs().nan_to_num(0.0, float("inf")).amax(1)
    _, exponent = torch.frexp(largest)
    fine = (largest >= 2.0**-113) & largest.isfinite()
    factors = torch.where(fine, torch.exp2((14 - exponent).double()), 1.0).float()
    return Fitted((states.float() * factors[:, None]).half(), factors)


def work_list(topk_ids: torch.Tensor, experts: int, part: int = 0, states: torch.Tensor | None = None) -> Work:
    """List the experts that ``topk_ids`` name, in one launch.

    Args:
        topk_ids: [num_tokens, k + S] int32; the ids of a token differ. Below 0: no expert.
        experts: ids are below this number, E + S.
        part: tokens of each of the smaller lists; 0: none are wanted.
        states: [num_tokens, H], contiguous: fit these.

    Raises:
        ValueError: there are too many tokens.
    """
    tokens, slots = topk_ids.shape
    work = room(topk_ids, part, states)
    _work[(1 + work.lists + (0 if states is None else tokens),)](
        topk_ids,
        *pointers(work, states, topk_ids),
        tokens,
        SLOTS=slots,
        SLOTS_P2=triton.next_power_of_2(slots),
        **sizes(work, experts, states),
        num_warps=WARPS,
        **options(topk_ids),
    )
    return work


def room(topk_ids: torch.Tensor, part: int, states: torch.Tensor | None) -> Work:
    """Make room for what `work_list` returns; arguments as there, of ``topk_ids`` the shape alone."""
    tokens = topk_ids.shape[0]
    whole = _room(topk_ids, tokens)
    parts = _room(topk_ids, part) if 0 < part < tokens else whole
    fitted = None
    if states is not None:
        factors = torch.empty(tokens, dtype=torch.float32, device=states.device)
        fitted = Fitted(torch.empty_like(states, dtype=torch.float16), factors)
    return Work(whole, parts, fitted)


def _room(topk_ids: torch.Tensor, tokens: int) -> WorkList:
    """Make room for lists of so many tokens each."""
    total, slots = topk_ids.shape
    lists, columns, places = triton.cdiv(total, tokens), columns_for(tokens), tokens * slots
    count, experts, rows = topk_ids.new_empty(lists * (1 + places * (1 + columns))).split(
        [lists, lists * places, lists * places * columns]
    )
    return WorkList(tokens, count, experts.view(lists, places), rows.view(lists, places, columns))


def pointers(work: Work, states: torch.Tensor | None, other: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the tensors that `one_of_the_blocks` takes; ``other`` stands where there is none."""
    fitted = (other, other, other)
    if states is not None and work.fitted is not None:
        fitted = (states, work.fitted.states, work.fitted.factors)
    whole, parts = work.whole, work.parts
    return (
        *(whole.count, whole.experts, whole.rows),
        *(parts.count, parts.experts, parts.rows),
        *fitted,
    )


def sizes(work: Work, experts: int, states: torch.Tensor | None) -> dict[str, Any]:
    """Return the sizes that kernels which make lists are told."""
    hidden = 0 if states is None else states.shape[1]
    return {
        "TOKENS_P2": triton.next_power_of_2(work.whole.tokens),
        "PART": work.parts.tokens,
        "WHOLE_COLUMNS": work.whole.columns,
        "WHOLE_PLACES": work.whole.experts.shape[1],
        "PART_COLUMNS": work.parts.columns,
        "PART_PLACES": work.parts.experts.shape[1],
        "LISTS": work.lists,
        "WORDS": triton.next_power_of_2(triton.cdiv(experts, 32)),
        "HIDDEN": hidden,
        "HIDDEN_P2": triton.next_power_of_2(max(hidden, 1)),
    }


@triton.jit
def _work(
    ids_ptr, count_ptr, experts_ptr, rows_ptr, part_count_ptr, part_experts_ptr, part_rows_ptr, x_ptr,
    fitted_ptr, factors_ptr, M, SLOTS: tl.constexpr, SLOTS_P2: tl.constexpr, TOKENS_P2: tl.constexpr,
    PART: tl.constexpr, WHOLE_COLUMNS: tl.constexpr, WHOLE_PLACES: tl.constexpr, PART_COLUMNS: tl.constexpr,
    PART_PLACES: tl.constexpr, LISTS: tl.constexpr, WORDS: tl.constexpr, HIDDEN: tl.constexpr,
    HIDDEN_P2: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    number = tl.program_id(0)
    if number <= LISTS:
        first = tl.maximum(number - 1, 0) * PART
        clear(rows_ptr, part_rows_ptr, number, WHOLE_COLUMNS, WHOLE_PLACES, PART_COLUMNS, PART_PLACES)
        offs_t = tl.arange(0, TOKENS_P2)[:, None]
        offs_s = tl.arange(0, SLOTS_P2)[None, :]
        size = tl.where(number == 0, M, tl.minimum(PART, M - first))
        pair = (first + offs_t) * SLOTS + offs_s
        expert = tl.load(ids_ptr + pair, mask=(offs_t < size) & (offs_s < SLOTS), other=-1)
        write_list(
            expert, number, first, count_ptr, experts_ptr, rows_ptr, part_count_ptr, part_experts_ptr,
            part_rows_ptr, SLOTS, WHOLE_COLUMNS, PART_COLUMNS, PART_PLACES, WORDS,
        )  # fmt: skip
    elif HIDDEN:
        fit(x_ptr, fitted_ptr, factors_ptr, number - LISTS - 1, HIDDEN, HIDDEN_P2)


@triton.jit
def clear(
    rows_ptr, part_rows_ptr, number, WHOLE_COLUMNS: tl.constexpr, WHOLE_PLACES: tl.constexpr,
    PART_COLUMNS: tl.constexpr, PART_PLACES: tl.constexpr,
):  # fmt: skip
    """Put -1 into the rows of list ``number``; 0 is the one of all tokens."""
    AT_ONCE: tl.constexpr = 512
    offs = tl.arange(0, AT_ONCE)
    if number == 0:
        for start in tl.static_range(0, WHOLE_PLACES * WHOLE_COLUMNS, AT_ONCE):
            tl.store(rows_ptr + start + offs, -1, mask=start + offs < WHOLE_PLACES * WHOLE_COLUMNS)
    else:
        rows_ptr = part_rows_ptr + (number - 1) * (PART_PLACES * PART_COLUMNS)
        for start in tl.static_range(0, PART_PLACES * PART_COLUMNS, AT_ONCE):
            tl.store(rows_ptr + start + offs, -1, mask=start + offs < PART_PLACES * PART_COLUMNS)


@triton.jit
def write_list(
    expert, number, first, count_ptr, experts_ptr, rows_ptr, part_count_ptr, part_experts_ptr, part_rows_ptr,
    SLOTS: tl.constexpr, WHOLE_COLUMNS: tl.constexpr, PART_COLUMNS: tl.constexpr, PART_PLACES: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    """Write list ``number`` of the tokens from ``first`` on.

    ``expert`` [tokens, slots] has their ids, below 0 where there is none. `clear` was called before.
    """
    TOKENS: tl.constexpr = expert.shape[0]
    ACROSS: tl.constexpr = expert.shape[1]
    expert = tl.reshape(expert, [TOKENS * ACROSS])
    there = expert >= 0
    offs = tl.arange(0, TOKENS * ACROSS)
    column = offs // ACROSS
    # A bit for each expert, 32 in a word: those below an expert's bit are the experts before it.
    at = tl.where(there, expert, 0) >> 5
    bit = tl.where(there, tl.full([TOKENS * ACROSS], 1, tl.uint32) << (expert & 31).to(tl.uint32), 0)
    word = tl.arange(0, WORDS)
    words = tl.reduce(tl.where(at[:, None] == word[None, :], bit[:, None], 0), 0, _or)
    ones = _ones(words)
    before = tl.cumsum(ones, 0) - ones
    place = tl.gather(before, at, 0) + _ones(tl.gather(words, at, 0) & (bit - 1))
    pair = (first + column) * SLOTS + offs % ACROSS
    # Rows were cleared by other threads than those that fill them.
    tl.debug_barrier()
    # Pairs of the same expert all write the same.
    if number == 0:
        tl.store(count_ptr, tl.sum(ones, 0))
        tl.store(experts_ptr + place, expert, mask=there)
        tl.store(rows_ptr + place * WHOLE_COLUMNS + column, pair, mask=there)
    else:
        part = number - 1
        tl.store(part_count_ptr + part, tl.sum(ones, 0))
        tl.store(part_experts_ptr + part * PART_PLACES + place, expert, mask=there)
        row = part * PART_PLACES + place
        tl.store(part_rows_ptr + row * PART_COLUMNS + column, pair, mask=there)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _ones(word):
    """Count the bits of 32-bit words."""
    word -= (word >> 1) & 0x55555555
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word + (word >> 8) + (word >> 16) + (word >> 24)) & 63).to(tl.int32)


@triton.jit
def fit(x_ptr, fitted_ptr, factors_ptr, token, HIDDEN: tl.constexpr, HIDDEN_P2: tl.constexpr):
    """Write one token's states as float16, times the factor by which they fit, and the factor."""
    offs_k = tl.arange(0, HIDDEN_P2)
    offs = token.to(tl.int64) * HIDDEN + offs_k
    x = tl.load(x_ptr + offs, mask=offs_k < HIDDEN, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), 0)
    # Of 2^e <= largest < 2^(e + 1) the exponent alone: the product is below 2^14. 1 for 0, infinity and NaN.
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    factor = ((254 + 13 - exponent) << 23).to(tl.float32, bitcast=True)
    factor = tl.where((exponent > 13) & (exponent < 255), factor, 1.0)
    tl.store(fitted_ptr + offs, (x * factor).to(tl.float16), mask=offs_k < HIDDEN)
    tl.store(factors_ptr + token, factor)
