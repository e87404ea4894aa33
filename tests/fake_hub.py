"""A Hugging Face hub on 127.0.0.1: as much of its HTTP interface as hf_hub_download and load_dataset use."""

import hashlib
import io
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

NOBODY = "http://127.0.0.1:9"  # as a proxy, it keeps every request to another host from leaving this machine


def commit_of(revision: str) -> str:
    """The commit that a revision of a fake repository names."""
    return hashlib.sha1(revision.encode(), usedforsecurity=False).hexdigest()


@dataclass
class Repo:
    """Files by revision and path. `token`: who may read; None for everybody. `cut`: answers to break off midway.

    `page`: what is answered in place of every file, with status 200 and none of the hub's headers. `other`: what a file
    holds when it is fetched, whatever was said of it before. `stall_s`: seconds before any answer.
    """

    revisions: dict[str, dict[str, bytes]]
    token: str | None = None
    cut: int = 0
    page: bytes | None = None
    other: bytes | None = None
    stall_s: float = 0.0


@dataclass(frozen=True)
class Request:
    """One request as it came."""

    method: str
    path: str
    authorization: str | None


@dataclass
class FakeHub:
    """What is served (models by "owner/name", data sets by "datasets/owner/name") and what was asked for."""

    url: str
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)

    def asked(self, method: str, end: str) -> list[Request]:
        """The requests of one method whose path ends so."""
        return [request for request in self.requests if request.method == method and request.path.endswith(end)]

    def environment(self, home: str, **more: str) -> dict[str, str]:
        """Environment of a process that knows this hub only, and whose caches are in `home`."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING")) and not name.lower().endswith("_proxy")
        }
        return {
            **inherited,
            "HF_ENDPOINT": self.url,
            "HF_HOME": home,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "HTTP_PROXY": NOBODY,
            "HTTPS_PROXY": NOBODY,
            "NO_PROXY": "127.0.0.1",
            **more,
        }


@contextmanager
def serve() -> Iterator[FakeHub]:
    """A hub without repositories, for as long as the block lives."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.hub = FakeHub(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that server_close() waits for all of them
    hub: FakeHub

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a client that went away."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10  # seconds that a connection may be idle
    server: _Server

    def end_headers(self) -> None:
        """One answer a connection: nobody has to wait for one that stays open."""
        self.send_header("Connection", "close")
        super().end_headers()

    def do_GET(self) -> None:
        """Serve what HEAD describes."""
        self._answer()

    def do_HEAD(self) -> None:
        """The same, without a body."""
        self._answer()

    def do_POST(self) -> None:
        """The path look-ups of the file system that `datasets` uses."""
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing on stderr: the tests look at it."""

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        path = unquote(urlsplit(self.path).path).lstrip("/")
        hub = self.server.hub
        hub.requests.append(Request(self.command, path, self.headers.get("Authorization")))
        is_api = path.startswith("api/")
        path = path.removeprefix("api/").removeprefix("models/")
        name = next((name for name in hub.repos if path == name or path.startswith(f"{name}/")), None)
        if name is None:
            # The hub does not tell who asks without a token whether a repository is there.
            return self._fail(401 if "Authorization" not in self.headers else 404, "RepoNotFound")
        repo, rest = hub.repos[name], path[len(name) + 1 :]
        time.sleep(repo.stall_s)
        if repo.token and self.headers.get("Authorization") != f"Bearer {repo.token}":
            return self._fail(401, "GatedRepo")
        verb, _, rest = rest.partition("/")
        # A branch or a tag, or the commit of one.
        revision = next((r for r in repo.revisions if f"{rest}/".startswith((f"{r}/", f"{commit_of(r)}/"))), None)
        if revision is None and (verb or not is_api):
            return self._fail(404, "RevisionNotFound")
        revision = revision or "main"
        files = repo.revisions[revision]
        inner = rest.partition("/")[2]
        if not is_api:
            return self._send_file(repo, revision, inner)
        if verb in ("", "revision"):
            siblings = [{"rfilename": file} for file in files]
            return self._send_json({"id": name, "sha": commit_of(revision), "siblings": siblings})
        if verb == "tree":
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() == "true"
            return self._send_json(_tree(files, inner, recursive=recursive))
        if verb == "paths-info":
            entries = {entry["path"]: entry for entry in _tree(files, "", recursive=True)}
            return self._send_json([entries[p] for p in parse_qs(body.decode()).get("paths", []) if p in entries])
        return self._fail(404, "EntryNotFound")

    def _send_file(self, repo: Repo, revision: str, file: str) -> None:
        if repo.page is not None:
            return self._send(repo.page, "text/html")
        content = repo.revisions[revision].get(file)
        if content is None:
            return self._fail(404, "EntryNotFound", commit_of(revision))
        if repo.other is not None and self.command == "GET":
            content = repo.other
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        rest = content[start:]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(rest)))
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit_of(revision))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if repo.cut and not file.endswith(".md"):
            repo.cut -= 1
            self.wfile.write(rest[: len(rest) // 2] if start == 0 else b"")
            self.close_connection = True
            return None
        self.wfile.write(rest)
        return None

    def _send_json(self, value: object) -> None:
        self._send(json.dumps(value).encode(), "application/json")

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _fail(self, status: int, code: str, commit: str | None = None) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", f"fake hub: {code}")
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _tree(files: dict[str, bytes], folder: str, *, recursive: bool = False) -> list[dict[str, object]]:
    """Files and folders below `folder`, as the hub lists them."""
    prefix = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, object]] = {}
    for path, content in files.items():
        if not path.startswith(prefix):
            continue
        parents = path.removeprefix(prefix).split("/")[:-1]
        for depth in range(1, len(parents) + 1):
            parent = prefix + "/".join(parents[:depth])
            if recursive or depth == 1:
                entries[parent] = {"type": "directory", "path": parent, "oid": commit_of(parent), "size": 0}
        if recursive or not parents:
            oid = hashlib.sha1(content, usedforsecurity=False).hexdigest()
            entries[path] = {"type": "file", "path": path, "oid": oid, "size": len(content)}
    return list(entries.values())


def wikitext(rows: dict[str, list[str]]) -> Repo:
    """A data set laid out as Salesforce/wikitext: parquet files of a configuration, named in the card."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = {"README.md": _CARD.encode()}
    for split, texts in rows.items():
        buffer = io.BytesIO()
        pq.write_table(pa.table({"text": texts}), buffer)
        files[f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet"] = buffer.getvalue()
    return Repo({"main": files})


_CARD = """---
configs:
- config_name: wikitext-2-raw-v1
  data_files:
  - split: test
    path: wikitext-2-raw-v1/test-*
  - split: train
    path: wikitext-2-raw-v1/train-*
---
# A small stand-in for WikiText
"""
