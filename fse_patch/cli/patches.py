"""``fse-patch patches``: the ledger, and whether its guards hold on the installed engines."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..errors import FsePatchError, RefusedError
from ..patches import ENGINES
from ..settings import SWITCHES
from .arguments import engine_option
from .output import print_json


def ledgers(engine: str | None = None) -> list[dict[str, Any]]:
    """Return the ledger of one engine, or of every engine that has one, ready for JSON.

    Raises:
        FsePatchError: unknown engine, no ledger for it, or a malformed one.
    """
    from ..adapters.patching import ledger

    chosen = [e for e in ENGINES if ledger.exists(e)] if engine is None else [engine]
    return [_describe(ledger.load(name)) for name in chosen]


def _describe(book: Any) -> dict[str, Any]:
    from ..adapters.patching import guards, standing

    try:
        installed: str | None = guards.engine_version(book)
    except FsePatchError:
        installed = None
    here, why = None, "not installed"
    if installed is not None:
        try:
            here = standing.standing_of(book, installed, SWITCHES)
        except RefusedError as error:
            why = error.reason

    def state(patch: Any) -> str:
        if here is None:
            return why
        if all(patch.id != p.id for p in here.patches):
            return f"not for {here.seams_of}"
        return str(here.problems.get(patch.id, "ok"))

    return {
        "engine": book.engine,
        "installed": installed,
        "tested": list(book.tested),
        "remark": "" if here is None else here.remark,
        "patches": [
            {
                "id": p.id,
                "target": p.target,
                "source": p.source.reference,
                "relies_on": [s.reference for s in p.relies_on],
                "versions": [str(v) for v in p.versions],
                "factory": p.factory,
                "why": p.why,
                "upstream": p.upstream,
                "remove_when": p.remove_when,
                "setting": p.setting,
                "guard": state(p),
            }
            for p in book.patches
        ],
    }


def command(
    engine: Annotated[str | None, engine_option()] = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """List every patch: its target, versions, why, upstream link, when it goes away, and its guard."""
    books = ledgers(engine)
    if json:
        print_json({"engines": books})
        return
    for book in books:
        installed = f"{book['installed']} installed" if book["installed"] else "not installed"
        typer.echo(f"{book['engine']}: {installed}; tested: {', '.join(book['tested'])}")
        if book["remark"]:
            typer.echo(f"  {book['remark']}")
        for patch in book["patches"]:
            typer.echo(f"\n  {patch['id']}: {patch['guard']}")
            for key in ("target", "versions", "why", "upstream", "remove_when"):
                value = patch[key]
                typer.echo(f"    {key:12} {', '.join(value) if isinstance(value, list) else value}")
