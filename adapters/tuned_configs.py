"""Tuned tables of an engine's own grouped GEMM: keyed by the number of experts, and few have one for E+S."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from .role import CONSTRUCTED

log = logging.getLogger("fse_patch")
# No table: the engine's own default.
NONE = "none"
# Number of experts -> the table that their grouped GEMM ran by in this process, as "E=512,N=512", or `NONE`.
LOOKED_UP: dict[int, str] = {}


def get_moe_configs(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``get_moe_configs``: fused layers without a table for their E+S experts take that for E."""

    @functools.wraps(original)
    def tuned(E: int, N: int, dtype: str | None, *args: Any, **kwargs: Any) -> Any:
        took, table = E, original(E, N, dtype, *args, **kwargs)
        routed = {r.layout.num_routed for r in CONSTRUCTED if r.start.merged and r.layout.num_experts == E}
        if table is None and routed:
            took = routed.pop()
            table = original(took, N, dtype, *args, **kwargs)
            log.debug(
                "tuned table of the grouped GEMM for %d experts: %s", E, "that of E" if table else "none"
            )
        # SGLang may have another one for the second GEMM.
        if not kwargs.get("down_moe"):
            LOOKED_UP[E] = f"E={took},N={N}" if table else NONE
        return table

    return tuned
