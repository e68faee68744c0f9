"""What is asked of a server over HTTP."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any

from ...errors import EngineError, FsePatchError

TIMEOUT = 120.0  # seconds for an answer


def is_up(url: str) -> bool:
    """Return whether a server says that it is ready."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError, HTTPException):
        return False


def ask(url: str, path: str, key: str, body: Any = None) -> Any:
    """Return the JSON that a server answers; with a body the question is a POST.

    Raises:
        EngineError: it does not answer.
        FsePatchError: it wants a key, or takes no such question.
    """
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    try:
        request = urllib.request.Request(
            url + path, None if body is None else json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise FsePatchError(f"{url}: the server wants a key ({error.code}); give --api-key") from None
        told = " ".join(error.read(400).decode("utf-8", "replace").split())
        raise FsePatchError(f"{url}{path}: status {error.code}: {told}") from None
    except (OSError, ValueError, HTTPException) as error:
        why = " ".join(str(getattr(error, "reason", error)).split())
        raise EngineError(f"{url}{path}: no answer: {why}") from None


def model_of(url: str, key: str) -> dict[str, Any]:
    """Return what a server says of the model that it serves: id, owned_by, max_model_len.

    Raises:
        FsePatchError: it serves none, or does not answer.
    """
    told = ask(url, "/v1/models", key)
    models = told.get("data") if isinstance(told, dict) else None
    if not models or not isinstance(models[0], dict) or "id" not in models[0]:
        raise FsePatchError(f"{url}: serves no model")
    return dict(models[0])
