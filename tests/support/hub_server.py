"""A stub of the Hub: the part of its HTTP API that names, revisions and files need, on a range server."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from range_server import RangeServer, serving


class HubStub:
    """Revisions of ``org/name``: a folder for each, whose files are LFS objects at signed URLs of another host.

    Attributes:
        server: of everything, and of the objects under ``/cdn``.
        token: that requests of the API need; None for a public model.
        signature: that URLs of objects need now.
        signed: places that were given out.
    """

    def __init__(self, server: RangeServer, root: Path) -> None:
        self.server, self.root = server, root
        self.token: str | None = None
        self.signature = "first-secret"
        self.signed = 0
        server.answer = self.answer

    @property
    def revisions(self) -> dict[str, str]:
        return {path.name: hashlib.sha1(path.name.encode()).hexdigest() for path in sorted(self.root.iterdir())}

    def answer(self, handler: Any) -> bool:
        parts = urlsplit(handler.path)
        path, query = parts.path, parse_qs(parts.query)
        if path.startswith("/cdn/"):
            if query.get("Signature") == [self.signature] and "Authorization" not in handler.headers:
                return False
            handler.answer(403, {})
            return True
        if self.token is not None and handler.headers.get("Authorization") != f"Bearer {self.token}":
            handler.answer(401, {"X-Error-Code": "RepoNotFound"})
            return True
        if found := re.fullmatch(r"/api/models/org/name(?:/(revision|tree|refs)(?:/([^/]*))?(/.*)?)?", path):
            self._api(handler, found[1] or "revision", unquote(found[2] or "main"), (found[3] or "").strip("/"), query)
        elif found := re.fullmatch(r"/org/name/resolve/([^/]*)/(.*)", path):
            self._resolve(handler, unquote(found[1]), unquote(found[2]))
        else:
            handler.answer(404, {"X-Error-Code": "RepoNotFound"})
        return True

    def _folder(self, revision: str) -> Path | None:
        names = {sha: name for name, sha in self.revisions.items()} | {name: name for name in self.revisions}
        return self.root / names[revision] if revision in names else None

    def _api(self, handler: Any, what: str, revision: str, inside: str, query: dict[str, list[str]]) -> None:
        def reply(data: Any) -> None:
            handler.answer(200, {"Content-Type": "application/json"}, json.dumps(data).encode())

        if what == "refs":
            refs = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in self.revisions.items()
            ]
            reply({"branches": refs, "tags": [], "converts": []})
            return
        folder = self._folder(revision)
        if folder is None:
            handler.answer(404, {"X-Error-Code": "RevisionNotFound"})
        elif what == "revision":
            reply({"id": "org/name", "sha": self.revisions[folder.name], "siblings": [], "private": False})
        else:
            top = folder / inside
            found = sorted(top.rglob("*") if query.get("recursive", [""])[0].lower() == "true" else top.iterdir())
            reply([self._entry(each, folder) for each in found])

    def _entry(self, path: Path, folder: Path) -> dict[str, Any]:
        name, oid = path.relative_to(folder).as_posix(), hashlib.sha1(str(path).encode()).hexdigest()
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": oid, "size": 0}
        size = path.stat().st_size
        lfs = {"oid": hashlib.sha256(path.read_bytes()).hexdigest(), "size": size, "pointerSize": 130}
        return {"type": "file", "path": name, "oid": oid, "size": size, "lfs": lfs}

    def _resolve(self, handler: Any, revision: str, name: str) -> None:
        folder = self._folder(revision)
        file = None if folder is None else folder / name
        if file is None or not file.is_file():
            handler.answer(404, {"X-Error-Code": "EntryNotFound"})
            return
        self.signed += 1
        host = self.server.url.replace("127.0.0.1", "localhost")
        place = f"{host}/cdn/{file.relative_to(self.root)}?Signature={self.signature}"
        headers = {
            "Location": place,
            "X-Repo-Commit": self.revisions[folder.name] if folder else "",
            "X-Linked-Size": str(file.stat().st_size),
            "X-Linked-Etag": f'"{hashlib.sha256(file.read_bytes()).hexdigest()}"',
        }
        handler.answer(302, headers)


@contextmanager
def a_hub(folder: Path) -> Iterator[HubStub]:
    """Serve the revisions in ``folder/cdn``."""
    (folder / "cdn").mkdir(exist_ok=True)
    with serving(folder) as server:
        yield HubStub(server, folder / "cdn")
