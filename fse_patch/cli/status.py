"""`fse-patch status`: whether fusing is on in a server that runs, and where not, why."""

from __future__ import annotations

import json as json_module
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import InvalidURL
from typing import Annotated, Any

import typer

from ..errors import FsePatchError, RefusedError
from ..status_endpoint import PATH
from .output import print_json, ranges, say

# Pages of a server that may know, in the order in which they are asked.
PAGES = (PATH, "/server_info", "/get_server_info", "/metrics")
_METRIC = re.compile(r"^(fse_patch_\w+)\{(.*)\} (\S+)$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
SILENT = (
    "the server does not say; vLLM: start it with VLLM_PLUGINS=fse_patch too; SGLang: 0.5.18 and later; "
    "whatever it is, its log has a line of fse_patch"
)


def command(
    url: Annotated[str, typer.Option(help="Where the server listens: http://host:port.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    api_key: Annotated[str, typer.Option(help="If the server wants one.")] = "",
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for an answer.")] = 10,
) -> None:
    """Run the command. Exit status: 0 fused in every process that answers, 3 not, 2 no answer."""
    url = address(url)
    ranks = ask(url, api_key, timeout)
    on = bool(ranks) and all(rank["fused"] for rank in ranks)
    if json:
        print_json({"url": url, "fused": on, "ranks": ranks})
    else:
        for rank in ranks:
            say(line(rank), "green" if rank["fused"] else "red")
    if not on:
        raise typer.Exit(RefusedError.exit_status)


def address(url: str) -> str:
    """Return where a server is, as others of ours take it: with http://, without / at the end."""
    return (url if url.startswith(("http://", "https://")) else f"http://{url}").rstrip("/")


def ask(url: str, api_key: str, timeout: float) -> list[dict[str, Any]]:
    """Return what each process of a server says.

    Keys: rank, engine, engine_version, role, fused, layout, layers, modes, proof, since (seconds since 1970),
    lm_head (as of `status()`), reason, detail; null where the server does not say.

    Raises:
        FsePatchError: it cannot be reached, or says nothing of fse_patch.
    """
    for page in PAGES:
        text = _get(url + page, api_key, timeout)
        found = [] if text is None else _read(page, text)
        if found:
            return found
    raise FsePatchError(f"{url}: {SILENT}")


def _get(url: str, api_key: str, timeout: float) -> str | None:
    """Return a page, or None where the server has none of that name."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout) as answer:
            return str(answer.read().decode("utf-8", "replace"))
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise FsePatchError(f"{url}: the server wants a key ({error.code}); give --api-key") from None
        return None
    except (OSError, ValueError, InvalidURL) as error:
        why = getattr(error, "reason", error)
        raise FsePatchError(f"{url}: no answer: {' '.join(str(why).split())}") from None


def _read(page: str, text: str) -> list[dict[str, Any]]:
    if page == "/metrics":
        return _of_metrics(text)
    try:
        data = json_module.loads(text)
    except ValueError:
        return []
    if not isinstance(data, dict):
        return []
    states = data.get("ranks") if page == PATH else _of_sglang(data)
    return [row for state in states or [] if isinstance(state, dict) for row in _rows(state)]


def _of_sglang(data: Mapping[str, Any]) -> list[Any]:
    states = data.get("internal_states")
    held = (
        [state.get("fse_patch") for state in states if isinstance(state, dict)]
        if isinstance(states, list)
        else []
    )
    return [{"rank": rank, **state} for rank, state in enumerate(held) if isinstance(state, dict)]


def _rows(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each role of a process; one without roles has one, with the reason."""
    head = {key: state.get(key) for key in ("rank", "engine", "engine_version", "since")}
    head["lm_head"] = next(iter(state.get("lm_heads") or []), None)
    rows = []
    for role in state.get("roles") or []:
        told = _paired(role) if role.get("weight_layout") == "paired" else _merged(role)
        rows.append({**head, "role": role.get("role"), **told})
    roles = {row["role"] for row in rows}
    for decision in state.get("decisions") or []:
        if decision.get("role") not in roles and not decision.get("fuse"):
            stock = _stock(decision.get("reason"), decision.get("detail", ""))
            rows.append({**head, "role": decision.get("role"), **stock})
    if not rows:
        why = state.get("reason") or "nothing was decided in this process"
        rows.append({**head, "role": None, **_stock("disabled", why)})
    return rows


def _merged(role: Mapping[str, Any]) -> dict[str, Any]:
    """Say what runs of a role whose shared experts are slots, ours or the engine's own."""
    layout = "native" if role.get("native") else "merged"
    return _fused(layout, role, role.get("modes"), (role.get("canary") or {}).get("state"))


def _paired(role: Mapping[str, Any]) -> dict[str, Any]:
    """Say what runs of a role whose weights stay apart; above its threshold the engine's own forward does."""
    loaded = role.get("paired")
    if loaded is None:
        return _fused("paired", role, None, "not_loaded")
    if not loaded.get("threshold"):
        return _stock(loaded.get("reason"), loaded.get("detail", ""))
    modes = f"paired up to {loaded['threshold']}, the engine's own beyond"
    return _fused("paired", role, modes, (loaded.get("proof") or {}).get("state"))


def _fused(layout: str, role: Mapping[str, Any], modes: str | None, proof: str | None) -> dict[str, Any]:
    layers = role.get("fused_layers") or role.get("built_layers") or []
    told = {"layout": layout, "layers": layers, "modes": modes, "proof": proof}
    return {"fused": True, **told, "reason": None, "detail": ""}


def _stock(reason: str | None, detail: str) -> dict[str, Any]:
    nothing = dict.fromkeys(("layout", "layers", "modes", "proof"))
    return {"fused": False, **nothing, "reason": reason, "detail": detail}


def _of_metrics(text: str) -> list[dict[str, Any]]:
    """Return a row for each decision that is counted; metrics have neither layers nor modes."""
    found = [match for line in text.splitlines() if (match := _METRIC.match(line))]
    # Of paired layers: a threshold of 0 where the engine runs all, whatever was decided.
    unpaired = {
        dict(_LABEL.findall(match[2])).get("engine")
        for match in found
        if match[1] == "fse_patch_paired_threshold" and float(match[3]) == 0
    }
    rows = []
    for match in (match for match in found if match[1] == "fse_patch_decisions_total"):
        labels = dict(_LABEL.findall(match[2]))
        layout, engine = labels.get("layout") or None, labels.get("engine")
        told = _stock(labels.get("reason"), "")
        if layout == "paired" and engine in unpaired:
            told = _stock(None, "the engine's own forward runs; its log says why")
        elif labels.get("fused") == "true":
            told = {**told, "fused": True, "layout": layout, "reason": None}
        nothing = dict.fromkeys(("rank", "engine_version", "since", "role", "lm_head"))
        rows.append({**nothing, "engine": engine, **told})
    return rows


def line(rank: Mapping[str, Any]) -> str:
    """Say what one process serves."""
    who = "" if rank["rank"] is None else f"rank {rank['rank']}, "
    who += f"{rank['role'] or 'any'} model of {rank['engine']} {rank['engine_version'] or ''}".rstrip()
    head = _head(rank["lm_head"])
    if not rank["fused"]:
        return ": ".join([who, "stock", *filter(None, (rank["reason"], rank["detail"]))]) + head
    parts = ["fused"]
    parts += [str(rank["layout"])] if rank["layout"] else []
    parts += [f"layers {ranges(rank['layers'])}"] if rank["layers"] else []
    parts += [f"modes {rank['modes']}"] if rank["modes"] else []
    parts += [f"proof {rank['proof']}"] if rank["proof"] else []
    if rank["since"]:
        parts.append("since " + time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(rank["since"])))
    return f"{who}: {', '.join(parts)}{head}"


def _head(told: Mapping[str, Any] | None) -> str:
    """Say what the LM head does where FSE_PATCH_LM_HEAD asks for something."""
    if told is None:
        return ""
    if told["threshold"]:
        return f"; LM head {told['format']} up to {told['threshold']} tokens"
    return f"; LM head stock: {told['reason']}"
