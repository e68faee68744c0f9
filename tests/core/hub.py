"""A model hub on loopback: serves the folders ORG/NAME below a root, and counts what was asked of it."""

from __future__ import annotations

import hashlib
import json
import threading
import urllib.parse
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any


class Hub:
    """The hub of one folder; a context manager.

    Args:
        root: holds the repositories; their commit follows from what is in them.
        refuses: status code for every file and question, 0 for none.
        dies_after: questions that are answered; the connection is cut at every other one. None: all.
    """

    def __init__(self, root: Path, refuses: int = 0, dies_after: int | None = None) -> None:
        self.root, self.refuses, self.dies_after = root, refuses, dies_after
        self.asked: Counter[str] = Counter()
        self.bytes_sent = 0
        # Branches besides main, as the real hub has them: name -> repository that shows there.
        self.branches: dict[str, str] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def files(self, repository: str) -> list[str] | None:
        """Names of a repository's files, None where there is none."""
        folder = self.root / repository
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else None

    def commit(self, repository: str) -> str:
        """The commit of a repository as it is now."""
        digest = hashlib.sha1()
        for name in self.files(repository) or ():
            digest.update(name.encode() + (self.root / repository / name).read_bytes())
        return digest.hexdigest()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                hub._answer(self)

            do_HEAD = do_POST = do_GET

        return Handler

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        length = int(request.headers.get("Content-Length") or 0)
        body = request.rfile.read(length)
        if self.dies_after is not None and sum(self.asked.values()) >= self.dies_after:
            request.close_connection = True
            request.connection.close()
            return
        parts = [urllib.parse.unquote(part) for part in request.path.partition("?")[0].strip("/").split("/")]
        self.asked[f"{request.command} {parts[-1]}"] += 1
        if self.refuses:
            code = {"X-Error-Code": "GatedRepo"} if self.refuses == 403 else {}
            self._send(request, json.dumps({"error": "no"}).encode(), self.refuses, code)
        elif parts[:2] == ["api", "models"]:
            self._about(request, "/".join(parts[2:4]), parts[4:], body)
        elif len(parts) >= 5 and parts[2] == "resolve":
            self._file(request, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._nothing(request, "EntryNotFound")

    def _at(self, repository: str, revision: str) -> str | None:
        """The repository that a revision shows, None where there is no such revision."""
        if revision in ("main", self.commit(repository)):
            return repository
        shown = [self.branches.get(revision), *self.branches.values()]
        return next(
            (name for name in shown if name and revision in (*self.branches, self.commit(name))), None
        )

    def _about(self, request: BaseHTTPRequestHandler, repository: str, rest: list[str], body: bytes) -> None:
        names = self.files(repository)
        if names is None:
            return self._nothing(request, "RepoNotFound")
        revision = rest[1] if len(rest) > 1 else "main"
        shown = self._at(repository, revision)
        if shown is None:
            return self._nothing(request, "RevisionNotFound")
        names = self.files(shown) or []
        what: Any
        if not rest or rest[0] == "revision":
            siblings = [{"rfilename": name} for name in names]
            what = {"id": repository, "modelId": repository, "sha": self.commit(shown), "siblings": siblings}
            what |= {"_id": "1", "private": False, "gated": False, "tags": [], "downloads": 0, "likes": 0}
        elif rest[0] == "tree":
            what = [self._entry(shown, name) for name in names]
        elif rest[0] == "paths-info":
            form = urllib.parse.parse_qs(body.decode())
            paths = form.get("paths") or (json.loads(body).get("paths", []) if body[:1] == b"{" else [])
            what = [self._entry(shown, name) for name in paths if name in names]
        elif rest[0] == "refs":
            main = {"name": "main", "ref": "refs/heads/main", "targetCommit": self.commit(repository)}
            what = {"branches": [main], "tags": [], "converts": []}
        else:
            return self._nothing(request, "EntryNotFound")
        self._send(request, json.dumps(what).encode(), 200, {"Content-Type": "application/json"})
        return None

    def _entry(self, repository: str, name: str) -> dict[str, Any]:
        path = self.root / repository / name
        return {"type": "file", "oid": self._etag(path), "size": path.stat().st_size, "path": name}

    def _etag(self, path: Path) -> str:
        return hashlib.sha1(path.read_bytes()).hexdigest()

    def _file(self, request: BaseHTTPRequestHandler, repository: str, revision: str, name: str) -> None:
        shown = self._at(repository, revision) if self.files(repository) is not None else None
        if shown is None:
            return self._nothing(request, "RevisionNotFound")
        path = self.root / shown / name
        if not path.is_file():
            return self._nothing(request, "EntryNotFound", {"X-Repo-Commit": self.commit(shown)})
        data, code = path.read_bytes(), 200
        known = {
            "ETag": f'"{self._etag(path)}"',
            "X-Repo-Commit": self.commit(shown),
            "Accept-Ranges": "bytes",
        }
        asked = (request.headers.get("Range") or "").partition("bytes=")[2]
        if asked:
            begin, _, end = asked.partition("-")
            first, last = int(begin or 0), min(int(end or len(data) - 1), len(data) - 1)
            known["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, code = data[first : last + 1], 206
        self._send(request, data, code, known)
        return None

    def _nothing(
        self, request: BaseHTTPRequestHandler, error: str, headers: dict[str, str] | None = None
    ) -> None:
        self._send(request, b'{"error": "not found"}', 404, {"X-Error-Code": error, **(headers or {})})

    def _send(
        self, request: BaseHTTPRequestHandler, body: bytes, status: int, headers: dict[str, str]
    ) -> None:
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            self.bytes_sent += len(body)
            request.wfile.write(body)
