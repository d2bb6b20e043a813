"""A small Hugging Face Hub on 127.0.0.1: enough of its protocol for the real client, and the faults to test it with."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

COMMIT = "a" * 40
GOOD_TOKEN = "hf_goodTokenOfATest"


class Request(NamedTuple):
    method: str
    path: str
    byte_range: str | None
    authorization: str | None


@dataclass
class Repository:
    files: dict[str, bytes]
    is_gated: bool = False


@dataclass
class Hub:
    """What is served, which faults come with it, and what was asked."""

    repositories: dict[str, Repository]
    cut_after: dict[str, list[int]] = field(default_factory=dict)
    """Bytes of a file after which its next transfers are cut, one number per transfer."""
    sent_instead: dict[str, bytes] = field(default_factory=dict)
    """Content that is transferred in place of the one that was announced."""
    status: int | None = None
    """Answers everything with this."""
    requests: list[Request] = field(default_factory=list)
    url: str = ""

    def downloads(self) -> list[Request]:
        return [request for request in self.requests if request.method == "GET" and "/resolve/" in request.path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "HubServer"

    def log_message(self, *_: object) -> None:
        """Say nothing: the requests are kept by the hub."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, authorization = self.server.hub, self.headers.get("Authorization")
        hub.requests.append(Request(self.command, self.path, self.headers.get("Range"), authorization))
        if hub.status is not None:
            return self.refuse(hub.status)
        if authorization not in (None, f"Bearer {GOOD_TOKEN}") and "Invalid" in authorization:
            return self.refuse(401, message="Invalid credentials in Authorization header")
        path = self.path.split("?")[0]
        asked = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        download = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = asked or download
        if match is None or match[1] not in hub.repositories:
            return self.refuse(404 if authorization else 401, code="RepoNotFound")
        repository = hub.repositories[match[1]]
        if (asked[3] if asked else download[2]) not in (None, "main", "v1", COMMIT):
            return self.refuse(404, code="RevisionNotFound")
        if asked:
            return self.describe(match[1], repository, lists=asked[2] == "tree")
        if repository.is_gated and authorization != f"Bearer {GOOD_TOKEN}":
            return self.refuse(403 if authorization else 401, code="GatedRepo", message="Access is restricted")
        if download[3] not in repository.files:
            return self.refuse(404, code="EntryNotFound")
        return self.send_content(download[3], repository.files[download[3]])

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        self.reply(status, {"error": message or code}, {"X-Error-Code": code, "X-Error-Message": message})

    def describe(self, name: str, repository: Repository, *, lists: bool) -> None:
        if lists:
            return self.reply(200, [tree_entry(file, content) for file, content in repository.files.items()])
        files = [sibling(file, content) for file, content in repository.files.items()]
        return self.reply(200, {"id": name, "modelId": name, "sha": COMMIT, "siblings": files})

    def reply(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def send_content(self, name: str, content: bytes) -> None:
        hub, checksum = self.server.hub, hashlib.sha256(content).hexdigest()
        if self.command == "GET":
            content = hub.sent_instead.get(name, content)
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "bytes=0-")[1])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{checksum}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            cuts = hub.cut_after.get(name)
            if cuts:
                self.wfile.write(content[start : start + cuts.pop(0)])
                self.close_connection = True
            else:
                self.wfile.write(content[start:])


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = hub

    def handle_error(self, *_: object) -> None:
        """A client that goes away is part of some tests."""


def tree_entry(name: str, content: bytes) -> dict:
    """A file as `/tree` lists it; all but JSON is kept in LFS, as on the Hub."""
    entry = {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    if not name.endswith(".json"):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


def sibling(name: str, content: bytes) -> dict:
    """The same file as the description of its repository lists it."""
    entry = {"rfilename": name, "size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
    if not name.endswith(".json"):
        entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve on a free port until the end of the block; after it the port refuses."""
    server = HubServer(hub)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
