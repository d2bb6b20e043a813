"""A small container registry on 127.0.0.1: enough of its protocol for enroot, and the faults to test with."""

import base64
import gzip
import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LOGIN = "$oauthtoken:key-of-a-test"
TOKEN = "token-of-a-test"
LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
SETTINGS = {"Env": ["SAYS=from the image"], "WorkingDir": "/srv", "Cmd": ["cat", "hello"]}


def packed(files: dict[str, bytes]) -> bytes:
    """A layer."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o755
            archive.addfile(entry, io.BytesIO(content))
    return gzip.compress(raw.getvalue(), mtime=0)


def digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@dataclass
class SmallRegistry:
    """What is served, which faults come with it, and what was asked."""

    host: str = ""
    """127.0.0.1:PORT."""

    blobs: dict[str, bytes] = field(default_factory=dict)
    tags: dict[str, bytes] = field(default_factory=dict)
    """REPOSITORY:TAG to its manifest."""

    wants_login: bool = False
    realm_host: str = "127.0.0.1"
    """Who gives out tokens: this server, under this name."""

    failures: int = 0
    """So many blobs are answered by an error first."""

    asked: list[str] = field(default_factory=list)
    """Method, path and Authorization of each request."""

    def push(self, name: str, files: dict[str, bytes]) -> str:
        """An image of one layer under REPOSITORY:TAG; its digest."""
        layer = packed(files)
        config = json.dumps({"architecture": "amd64", "os": "linux", "config": SETTINGS}).encode()
        for blob in (layer, config):
            self.blobs[digest(blob)] = blob
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {
                "mediaType": "application/vnd.docker.container.image.v1+json",
                "size": len(config),
                "digest": digest(config),
            },
            "layers": [{"mediaType": LAYER, "size": len(layer), "digest": digest(layer)}],
        }
        text = json.dumps(manifest).encode()
        repository = name.rpartition(":")[0]
        self.tags[name] = self.tags[f"{repository}:{digest(text)}"] = text
        return digest(text)


class _Handler(BaseHTTPRequestHandler):
    registry: SmallRegistry

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        registry, path = self.registry, self.path.partition("?")[0]
        authorization = self.headers.get("Authorization", "")
        registry.asked.append(f"{self.command} {path} {authorization}".strip())
        if path == "/token":
            right = "Basic " + base64.b64encode(LOGIN.encode()).decode()
            self._send(*((200, json.dumps({"token": TOKEN}).encode()) if authorization == right else (401, b"")))
        elif registry.wants_login and authorization != f"Bearer {TOKEN}":
            realm = registry.host.replace("127.0.0.1", registry.realm_host)
            challenge = f'Bearer realm="http://{realm}/token",service="{registry.host}",scope="pull"'
            self._send(401, b"", {"WWW-Authenticate": challenge})
        elif "/manifests/" in path:
            repository, _, reference = path.removeprefix("/v2/").partition("/manifests/")
            text = registry.tags.get(f"{repository}:{reference}")
            headers = {"Content-Type": MANIFEST, "Docker-Content-Digest": digest(text or b"")}
            self._send(404, b"") if text is None else self._send(200, text, headers)
        elif registry.failures > 0:
            registry.failures -= 1
            self._send(503, b"")
        else:
            blob = registry.blobs.get(path.rpartition("/")[2])
            self._send(404, b"") if blob is None else self._send(200, blob)

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def served() -> Iterator[SmallRegistry]:
    """A registry with lab/base:1.0 for the length of a block."""
    registry = SmallRegistry()
    registry.push("lab/base:1.0", {"srv/hello": b"hello\n"})
    handler = type("Handler", (_Handler,), {"registry": registry})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        registry.host = f"127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        yield registry
        server.shutdown()
