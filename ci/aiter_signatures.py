"""Regenerate tests/fakes/aiter_signatures.json from a checkout of AITER, or check that it is up to date.

    python ci/aiter_signatures.py --checkout DIR [--commit HASH] [--write]

DIR is a clone of https://github.com/ROCm/aiter with its tags. Sources are parsed, never imported or copied:
of each function the names of its parameters are kept, their defaults as source text, its decorators, and
whether it has a body of its own. ``--commit`` adds a state that has no tag. Without --write, exit status 1
says that the file is stale.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from generated import settle

FILE = Path(__file__).parents[1] / "tests" / "fakes" / "aiter_signatures.json"
# Releases after which something changed that a caller can see.
TAGS = (
    "v0.1.4", "v0.1.5", "v0.1.5.post3", "v0.1.7", "v0.1.10.post3", "v0.1.11", "v0.1.12.post2", "v0.1.13",
    "v0.1.14", "v0.1.17", "v0.1.18", "v0.1.19", "v0.1.19.post2", "v0.1.20.post1",
)  # fmt: skip
FUNCTIONS = {
    "aiter/ops/moe_op.py": ("topk_softmax", "topk_sigmoid"),
    "aiter/ops/topk.py": ("biased_grouped_topk", "grouped_topk", "moe_fused_gate"),
    "aiter/fused_moe.py": ("fused_moe", "fused_topk"),
    "aiter/ops/shuffle.py": ("shuffle_weight",),
}


def source(checkout: Path, state: str, path: str) -> str | None:
    """Return a file as a tag or commit has it; None where it has none."""
    done = subprocess.run(
        ["git", "-C", str(checkout), "show", f"{state}:{path}"], capture_output=True, text=True, check=False
    )
    return done.stdout if done.returncode == 0 else None


def facts_of(function: ast.FunctionDef) -> dict[str, Any]:
    """Return facts of one definition; a parameter without a default has only its name."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    pairs = [
        *zip(positional, defaults, strict=True),
        *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
    ]
    body = function.body
    stub = len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    return {
        "parameters": [[a.arg] if d is None else [a.arg, ast.unparse(d)] for a, d in pairs],
        "decorators": [
            ast.unparse(d.func if isinstance(d, ast.Call) else d) for d in function.decorator_list
        ],
        "stub": stub,
    }


def read(checkout: Path, state: str) -> dict[str, dict[str, Any]]:
    """Return what a tag or commit has of FUNCTIONS, by name."""
    definitions = {}
    for path, names in FUNCTIONS.items():
        text = source(checkout, state, path)
        for node in ast.parse(text or "").body:
            if isinstance(node, ast.FunctionDef) and node.name in names:
                definitions[node.name] = {"file": path, **facts_of(node)}
    return definitions


def rows(data: dict[str, Any]) -> str:
    """Return ``data`` as JSON, a function a line."""
    states = []
    for state, functions in data["states"].items():
        lines = (f"   {json.dumps(name)}: {json.dumps(facts)}" for name, facts in sorted(functions.items()))
        states.append(f"  {json.dumps(state)}: {{\n" + ",\n".join(lines) + "\n  }")
    head = "".join(f" {json.dumps(name)}: {json.dumps(data[name])},\n" for name in ("source", "commit"))
    return "{\n" + head + ' "states": {\n' + ",\n".join(states) + "\n }\n}\n"


def main() -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkout", required=True, type=Path)
    parser.add_argument("--commit", help="a state without a tag; default: the one that the file has")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    old = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {"commit": None}
    commit = args.commit or old["commit"]
    states = {state: read(args.checkout, state) for state in (*TAGS, *filter(None, [commit]))}
    if empty := [state for state, definitions in states.items() if "fused_moe" not in definitions]:
        print(f"{args.checkout} has no {', '.join(empty)}", file=sys.stderr)
        return 2
    new = {"source": "https://github.com/ROCm/aiter", "commit": commit, "states": states}
    return settle(FILE, rows(new), args.write)


if __name__ == "__main__":
    raise SystemExit(main())
