"""`fse-patch tuned`: what was measured on this machine, in the user's cache folder."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .. import settings
from ..errors import FsePatchError
from ..fusion_core.forward import measured_cache
from .output import print_json, print_table

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="What was measured on this machine: thresholds of paired layers.",
)
_JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_NAME = Annotated[str, typer.Argument(help="Name of an entry, as `list` shows it.")]


@app.command("list")
def list_all(json: _JSON = False) -> None:
    """List every entry: its name, threshold in tokens, and what was measured."""
    folder = settings.load().cache_folder
    found = measured_cache.kept(folder)
    if json:
        entries = [{"name": name, **entry.model_dump()} for name, entry in found.items()]
        print_json({"folder": str(folder), "entries": entries})
        return
    print_table(
        f"{len(found)} measured in {folder}",
        {name: f"up to {entry.threshold} tokens: {entry.words}" for name, entry in found.items()},
    )


@app.command("show")
def show(name: _NAME, json: _JSON = False) -> None:
    """Show one entry: situation, threshold, and the lower bounds of stock over paired."""
    folder = settings.load().cache_folder
    entry = measured_cache.kept(folder).get(name)
    if entry is None:
        raise FsePatchError(f"{name}: nothing of that name is kept in {folder}; see `fse-patch tuned list`")
    report: dict[str, Any] = {"name": name, **entry.model_dump()}
    print_json(report) if json else print_table(entry.words, report)


@app.command("remove")
def remove(name: _NAME, json: _JSON = False) -> None:
    """Remove one entry: the next start measures again."""
    measured_cache.remove(settings.load().cache_folder, name)
    print_json({"removed": name}) if json else typer.echo(f"{name}: removed")
