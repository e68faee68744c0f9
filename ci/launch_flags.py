"""Write patches/<engine>.flags.json, the flags of an engine's server, or check that it is up to date.

    python ci/launch_flags.py --engine vllm --python PYTHON [--python PYTHON ...] [--write]

Each PYTHON is that of an environment with one release: the engine's own parser is asked there. Flags of
releases that are not given stay. Without --write, exit status 1 says that the file is out of date.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from environment import ROOT
from generated import settle

# Runs in the engine's environment; prints its version and its flags after a line of this text.
MARK = "fse_patch flags:"
ASK = {
    "vllm": """
try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
except ImportError:
    from vllm.entrypoints.openai.cli_args import make_arg_parser
from vllm import __version__ as version
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
""",
    "sglang": """
from sglang import __version__ as version
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
""",
}
LOOK = """
import argparse, json
{ask}
# What an action of argparse does is in its behaviour, not in its name: engines have classes of their own.
def takes(action):
    if action.nargs == 0:
        return "yes_no" if any(name.startswith("--no-") for name in action.option_strings) else "nothing"
    if isinstance(action, argparse._AppendAction):
        return "one_each"
    return {{None: "one", "?": "maybe", "+": "some", "*": "any"}}[action.nargs]
rows = [
    {{"names": list(a.option_strings), "to": a.dest, "takes": takes(a)}}
    for a in parser._actions
    if not isinstance(a, (argparse._HelpAction, argparse._VersionAction))
]
print("{mark}" + json.dumps([version, rows]))
"""
Row = dict[str, Any]


def flags_of(engine: str, python: str) -> tuple[str, list[Row]]:
    """Ask an environment; returns the release and its flags."""
    code = LOOK.format(ask=ASK[engine], mark=MARK)
    done = subprocess.run([python, "-c", code], cwd="/", capture_output=True, text=True)
    line = next((text for text in done.stdout.splitlines() if text.startswith(MARK)), None)
    if line is None:
        raise SystemExit(f"{python}: {engine} does not tell its flags: {done.stderr.strip()[-400:]}")
    version, rows = json.loads(line.removeprefix(MARK))
    return version.partition("+")[0], rows


def merge(old: Row, new: dict[str, list[Row]]) -> Row:
    """Return the data of all releases; a row that not all of them have names those that do."""
    by_release: dict[str, list[Row]] = {}
    for release in old.get("releases", []):
        rows = [r for r in old["flags"] if release in r.get("releases", old["releases"])]
        by_release[release] = [{k: v for k, v in row.items() if k != "releases"} for row in rows]
    by_release |= new
    releases = sorted(by_release, key=lambda text: [int(part) for part in text.split(".")])
    rows = {json.dumps(row): row for release in reversed(releases) for row in by_release[release]}
    merged = []
    for row in rows.values():
        having = [release for release in releases if row in by_release[release]]
        merged.append(row if having == releases else {**row, "releases": having})
    return {"releases": releases, "flags": sorted(merged, key=lambda r: (r["to"], r["names"]))}


def page(data: Row) -> str:
    """Return the text of the file, a flag a line."""
    rows = ",\n".join(f"  {json.dumps(row)}" for row in data["flags"])
    return f'{{"releases": {json.dumps(data["releases"])}, "flags": [\n{rows}\n]}}\n'


def main() -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--engine", required=True, choices=ASK)
    parser.add_argument("--python", required=True, action="append")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    path = ROOT / "patches" / f"{args.engine}.flags.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    new = dict(flags_of(args.engine, python) for python in args.python)
    return settle(path, page(merge(old, new)), args.write)


if __name__ == "__main__":
    sys.exit(main())
