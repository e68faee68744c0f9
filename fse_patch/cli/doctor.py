"""`fse-patch doctor`: whether fse_patch would work in this environment, and what is in force in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer

from .arguments import folder_of
from .output import print_json, print_table, say


def command(
    checkpoint: Annotated[str | None, typer.Argument(help="Whose tuned tables to look up.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print everything that is known.")] = False,
) -> None:
    """Run the command. Exit status: 0 fine, 1 something is wrong, 2 bad input."""
    from ..doctor import examine

    report = examine(None if checkpoint is None else folder_of(checkpoint))
    if json:
        print_json(report)
    else:
        _print(report, verbose)
    if not report["ok"]:
        raise typer.Exit(1)


def _print(report: Mapping[str, Any], verbose: bool) -> None:
    for row in report["verdicts"]:
        say(
            row["sentence"],
            "red" if row["served"] == "stock" else "yellow" if row["served"] == "native" else "green",
        )
    for problem in report["problems"]:
        say(f"problem: {problem}", "red")
    for hazard in report["hazards"]:
        say(f"hazard: {hazard}", "yellow")
    if report["ok"]:
        say("no problems")
    if verbose:
        print_table("fse-patch doctor", table(report))
    else:
        say("More: fse-patch doctor --verbose. Of one model: fse-patch plan MODEL -- YOUR LAUNCH COMMAND")


def table(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report in rows for people: what is wrong last, where it is seen."""
    rows: dict[str, Any] = dict(report["environment"])
    for engine in report["engines"]:
        rows[engine["engine"]] = _engine(engine)
    rows["settings"] = {name: _setting(**entry) for name, entry in report["settings"].items()}
    rows["policy"] = f"{', '.join(report['policy']['files'])}; hash {report['policy']['hash'] or '-'}"
    layout = report["layout"]
    pairing = [engine for engine, pairs in layout["pairs_by_itself"].items() if pairs]
    rows["layout"] = (
        f"{layout['asked']}; pairs here by itself: {', '.join(pairing) or 'no engine'}; "
        f"{len(layout['measured'])} thresholds in {layout['cache']}; "
        f"reads {', '.join(layout['reads'])}"
    )
    rows["modes"] = "\n".join(
        f"{entry['file']}: {entry['for']}{'' if entry['here'] else ' (no such device here)'}: "
        + "; ".join(entry["shapes"])
        for entry in report["modes"]
    )
    rows["hazards"] = "\n".join(report["hazards"])
    rows["problems"] = "\n".join(report["problems"])
    rows["devices"] = ", ".join(rows["devices"])
    return rows


def _setting(value: str, origin: str) -> str:
    # Set to 1, arguments that forbid to fuse stop the server as well.
    return (
        "unset: what cannot be patched stops the server"
        if origin == "unset"
        else f"{value or '-'} ({origin})"
    )


def _engine(engine: Mapping[str, Any]) -> dict[str, Any]:
    if engine["installed"] is None:
        return {"installed": False, "switched on": engine["switched_on"]}
    standing = engine["remark"] or ("tested" if engine["is_tested"] else "not run")
    sound = sum(state == "ok" for state in engine["guards"].values())
    return {
        "installed": f"{engine['installed']} ({standing})",
        "switched on": engine["switched_on"],
        "entry points": ", ".join(engine["entry_points"]),
        "guards": f"{sound} of {len(engine['guards'])} hold",
        "fuses by itself": "; ".join(
            f"{entry['family']}: {'on by default' if entry['by_default'] else 'off by default'}, "
            f"needs {entry['condition']}"
            for entry in engine["native_fusion"]
        ),
        "tuned tables": "\n".join(_tables(engine["tables"])),
    }


# Of a row's `table`.
_TABLE = {
    "own": "one for E+S",
    "kept": "none for E+S, the one of E is used",
    "lost": "none for E+S, the one of E is lost (up to 26 % was measured)",
    "none": "none, fused or not",
}


def _tables(rows: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """Return a line for each shape and state, with the widths of all parts."""
    lines: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        shared = row["fused_experts"] - row["experts"]
        shape = f"{row['shape']} ({row['experts']}+{shared} experts, {row['format']})"
        lines.setdefault((shape, row["table"]), []).append(str(row["width"]))
    for (shape, state), widths in lines.items():
        yield f"{shape}, width {', '.join(widths)}: {_TABLE[state]}"
