"""What kernels/experts_once.py walks: the experts that some tokens chose, and who chose each.

Beside it, for FP8 weights, the states of each token as float16, times a power of two by which they fit.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def work_list(
    topk_ids: torch.Tensor, experts: int, part: int = 0, states: torch.Tensor | None = None
) -> Work:
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
    whole = _room(topk_ids, tokens)
    parts = _room(topk_ids, part) if 0 < part < tokens else whole
    lists = 0 if parts is whole else len(parts.count)
    fitted, hidden, tensors = None, 0, (topk_ids, topk_ids, topk_ids)
    if states is not None:
        factors = torch.empty(tokens, dtype=torch.float32, device=states.device)
        fitted = Fitted(torch.empty_like(states, dtype=torch.float16), factors)
        hidden, tensors = states.shape[1], (states, fitted.states, factors)
    _work[(1 + lists + (tokens if hidden else 0),)](
        topk_ids,
        *(whole.count, whole.experts, whole.rows),
        *(parts.count, parts.experts, parts.rows),
        *tensors,
        tokens,
        SLOTS=slots,
        SLOTS_P2=triton.next_power_of_2(slots),
        TOKENS_P2=triton.next_power_of_2(tokens),
        PART_P2=triton.next_power_of_2(parts.tokens),
        PART=parts.tokens if lists else 0,
        WHOLE_COLUMNS=whole.columns,
        WHOLE_PLACES=whole.experts.shape[1],
        PART_COLUMNS=parts.columns,
        PART_PLACES=parts.experts.shape[1],
        LISTS=lists,
        WORDS=triton.next_power_of_2(triton.cdiv(experts, 32)),
        HIDDEN=hidden,
        HIDDEN_P2=triton.next_power_of_2(max(hidden, 1)),
        num_warps=WARPS,
        **options(topk_ids),
    )
    return Work(whole, parts, fitted)


def _room(topk_ids: torch.Tensor, tokens: int) -> WorkList:
    """Make room for lists of so many tokens each."""
    total, slots = topk_ids.shape
    lists, columns = triton.cdiv(total, tokens), columns_for(tokens)
    # Sizes that kernels are compiled for are few: what the start has run, all serving runs.
    places = triton.next_power_of_2(tokens) * slots
    count, experts, rows = topk_ids.new_empty(lists * (1 + places * (1 + columns))).split(
        [lists, lists * places, lists * places * columns]
    )
    return WorkList(tokens, count, experts.view(lists, places), rows.view(lists, places, columns))


@triton.jit(do_not_specialize=["M"])
def _work(
    ids_ptr, count_ptr, experts_ptr, rows_ptr, part_count_ptr, part_experts_ptr, part_rows_ptr, x_ptr,
    fitted_ptr, factors_ptr, M, SLOTS: tl.constexpr, SLOTS_P2: tl.constexpr, TOKENS_P2: tl.constexpr,
    PART_P2: tl.constexpr, PART: tl.constexpr, WHOLE_COLUMNS: tl.constexpr, WHOLE_PLACES: tl.constexpr,
    PART_COLUMNS: tl.constexpr, PART_PLACES: tl.constexpr, LISTS: tl.constexpr, WORDS: tl.constexpr,
    HIDDEN: tl.constexpr, HIDDEN_P2: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    number = tl.program_id(0)
    if number == 0:
        _list(
            ids_ptr, count_ptr, experts_ptr, rows_ptr, 0, M, SLOTS, SLOTS_P2, TOKENS_P2, WHOLE_COLUMNS,
            WHOLE_PLACES, WORDS,
        )  # fmt: skip
    elif number <= LISTS:
        part = number - 1
        _list(
            ids_ptr, part_count_ptr + part, part_experts_ptr + part * PART_PLACES,
            part_rows_ptr + part * PART_PLACES * PART_COLUMNS, part * PART, tl.minimum(PART, M - part * PART),
            SLOTS, SLOTS_P2, PART_P2, PART_COLUMNS, PART_PLACES, WORDS,
        )  # fmt: skip
    elif HIDDEN:
        _fit(x_ptr, fitted_ptr, factors_ptr, number - LISTS - 1, HIDDEN, HIDDEN_P2)


@triton.jit
def _list(
    ids_ptr, count_ptr, experts_ptr, rows_ptr, first, size, SLOTS: tl.constexpr, SLOTS_P2: tl.constexpr,
    TOKENS_P2: tl.constexpr, COLUMNS: tl.constexpr, PLACES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Make one list, of ``size`` tokens from ``first`` on."""
    P2: tl.constexpr = TOKENS_P2 * SLOTS_P2
    offs = tl.arange(0, P2)
    for start in tl.static_range(0, PLACES * COLUMNS, P2):
        tl.store(rows_ptr + start + offs, -1, mask=start + offs < PLACES * COLUMNS)
    column = offs // SLOTS_P2
    pair = (first + column) * SLOTS + offs % SLOTS_P2
    expert = tl.load(ids_ptr + pair, mask=(column < size) & (offs % SLOTS_P2 < SLOTS), other=-1)
    there = expert >= 0
    # A bit for each expert, 32 in a word: those below an expert's bit are the experts before it.
    at = tl.where(there, expert, 0) >> 5
    bit = tl.where(there, tl.full([P2], 1, tl.uint32) << (expert & 31).to(tl.uint32), 0)
    word = tl.arange(0, WORDS)
    words = tl.reduce(tl.where(at[:, None] == word[None, :], bit[:, None], 0), 0, _or)
    ones = _ones(words)
    before = tl.cumsum(ones, 0) - ones
    place = tl.gather(before, at, 0) + _ones(tl.gather(words, at, 0) & (bit - 1))
    tl.store(count_ptr, tl.sum(ones, 0))
    # Pairs of the same expert all write the same.
    tl.store(experts_ptr + place, expert, mask=there)
    # Rows were cleared by other threads than those that fill them.
    tl.debug_barrier()
    tl.store(rows_ptr + place * COLUMNS + column, pair, mask=there)


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
def _fit(x_ptr, fitted_ptr, factors_ptr, token, HIDDEN: tl.constexpr, HIDDEN_P2: tl.constexpr):
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
