"""Tiny random checkpoints of every family, for tests and the demo. Needs transformers; downloads nothing.

    python ci/tiny_checkpoints.py OUT [NAME ...] [--dtype float32|bfloat16] [--seed N]

As a module (with ``ci`` on the path): ``make``, ``permute``, ``huge_headers``, ``RECIPES``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from checkpoints.headers import huge_headers
from checkpoints.make import make
from checkpoints.permute import permute
from checkpoints.recipes import RECIPES, Recipe

__all__ = ["RECIPES", "Recipe", "huge_headers", "make", "permute"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if unknown := [n for n in args.names if n not in RECIPES]:
        parser.error(f"no recipe {unknown[0]!r}; there are {', '.join(RECIPES)}")
    for name in args.names or RECIPES:
        folder = make(name, args.out / name, args.dtype, args.seed)
        size = sum(f.stat().st_size for f in folder.iterdir())
        print(f"{name:24} {args.dtype:9} {size / 1e6:6.2f} MB  {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
