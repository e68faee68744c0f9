"""The two records of this folder: a format, and a method whose configs speak of formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .claims import Claim, Resolver, Section
from .layouts import Layout

if TYPE_CHECKING:
    # Headers are read without torch.
    import torch

    # (weight [out, in] float64, its scales float64 as a matrix or None, rows and columns of a group) ->
    # the weight [out, in] float64; may be computed in place.
    Dequantise = Callable[[torch.Tensor, torch.Tensor | None, tuple[int, int]], torch.Tensor]
    # (tensors of the projection by suffix, its claim, the model's dtype) -> the weight [out, in] float64.
    Unpack = Callable[[Mapping[str, torch.Tensor], Claim, torch.dtype], torch.Tensor]


@dataclass(frozen=True)
class Format:
    """A way to store the weight [out, in] of one projection. No field has a default: each is a decision.

    Args:
        name: what claims and policies call it: "plain", "fp8-block", "int4-gptq", ...
        layout: the tensors that it stores; None where these are not known: never fused.
        dequantise: how the canary reads it where one tensor has a number for each weight; None where it does
            not.
        unpack: how the canary reads it where a number of several tensors makes a weight; None where it does
            not.
        table_dtype: dtype in the file names of engines' tuned tables, "" where these name none there; None
            where no table is looked up.
    """

    name: str
    layout: Layout | None
    dequantise: Dequantise | None
    unpack: Unpack | None
    table_dtype: str | None


@dataclass(frozen=True)
class Method:
    """A quantisation method, as checkpoints declare it and engines run it.

    Args:
        names: values of ``quant_method`` that declare it, lower case, with "-" for "_".
        parse: reads such a config; raises Doubt at what it does not know.
        formats: those that its claims name, but for "plain".
        engine_names: engines' names of the code that reads such a checkpoint as it is stored.
    """

    names: tuple[str, ...]
    parse: Callable[[Section], Resolver]
    formats: tuple[Format, ...]
    engine_names: frozenset[str]
