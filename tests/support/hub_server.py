"""A Hugging Face hub on loopback: the requests that `HfFileSystem` makes of one dataset's repository, answered in the
shapes of the real one."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


class HubServer(ThreadingHTTPServer):
    """Server of one dataset. `commit` is what its branch `main` is, and the only other revision."""

    daemon_threads = True

    def __init__(self, repository: str, folder: Path, commit: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repository, self.folder, self.commit = repository, folder, commit
        self.requests: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def described(self, path: Path) -> dict[str, object]:
        """Return a file or folder as the hub's listings do."""
        name = path.relative_to(self.folder).as_posix()
        if path.is_dir():
            return {"type": "directory", "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0, "path": name}  # noqa: S324
        data = path.read_bytes()
        sha = hashlib.sha256(data).hexdigest()
        return {
            "type": "file",
            "oid": hashlib.sha1(data).hexdigest(),  # noqa: S324 - as git does
            "size": len(data),
            "path": name,
            "lfs": {"oid": sha, "size": len(data), "pointerSize": 134},
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, parts = self.server, urlsplit(self.path)
        path = unquote(parts.path)
        hub.requests.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        api, files = f"/api/datasets/{hub.repository}", f"/datasets/{hub.repository}/resolve/"
        if path.startswith(files):
            revision, _, name = path.removeprefix(files).partition("/")
            self._file(revision, name)
            return
        found = re.fullmatch(rf"{re.escape(api)}(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path)
        if found is None or not self._knows(found[2]):
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif found[1] in (None, "revision"):
            self._json({"_id": "1", "id": hub.repository, "sha": hub.commit, "private": False, "siblings": []})
        elif found[1] == "tree":
            self._json(
                self._tree(found[3] or "", recursive="true" in parse_qs(parts.query).get("recursive", ["false"]))
            )
        else:
            wanted = json.loads(body)["paths"] if self.headers.get_content_type() == "application/json" else None
            wanted = parse_qs(body.decode()).get("paths", []) if wanted is None else wanted
            self._json([hub.described(hub.folder / name) for name in wanted if (hub.folder / name).exists()])

    def _knows(self, revision: str | None) -> bool:
        return revision in (None, "main", self.server.commit)

    def _tree(self, below: str, *, recursive: bool) -> list[dict[str, object]]:
        folder = self.server.folder / below
        found = sorted(folder.rglob("*") if recursive else folder.glob("*"))
        return [self.server.described(path) for path in found]

    def _file(self, revision: str, name: str) -> None:
        path = self.server.folder / name
        if not self._knows(revision) or not path.is_file():
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        data, status, headers = path.read_bytes(), 200, {}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or ""):
            start, end = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            data, status = data[start : end + 1], 206
        etag = hashlib.sha256(path.read_bytes()).hexdigest()
        self._send(data, status, {"ETag": f'"{etag}"', "X-Repo-Commit": self.server.commit} | headers)

    def _json(self, payload: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(payload).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def _send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def served(repository: str, folder: Path, commit: str) -> Iterator[HubServer]:
    """Serve a folder as the dataset `repository`."""
    server = HubServer(repository, folder, commit)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
