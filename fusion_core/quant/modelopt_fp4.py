"""`quant_method` modelopt_fp4: modelopt's config under another name.

A method of its own, because engines tell the two apart: SGLang makes FP4 of FP8 under this name.
"""

from __future__ import annotations

from . import modelopt
from .records import Method

METHOD = Method(
    names=("modelopt-fp4",),
    parse=modelopt.parse,
    formats=modelopt.METHOD.formats,
    engine_names=frozenset({"modelopt-fp4"}),
)
