"""What a container registry says of an image, asked with enroot's own credentials before anything is queued."""

import base64
import json
import os
import platform
import re
import stat
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.launch.images import ImageName

ACCEPT = ", ".join(
    f"application/vnd.{kind}+json"
    for kind in ("docker.distribution.manifest.list.v2", "oci.image.index.v1",
                 "docker.distribution.manifest.v2", "oci.image.manifest.v1")
)  # fmt: skip

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}

TIMEOUT_S = 30.0


@dataclass(frozen=True)
class RemoteImage:
    """An image as its registry describes it."""

    digest: str
    """sha256:... of what the tag points to now."""

    layers: dict[str, int]
    """Compressed bytes of each layer, by its digest."""

    @property
    def size(self) -> int:
        """Bytes to be transferred."""
        return sum(self.layers.values())


class Login(NamedTuple):
    """A line of enroot's file of credentials."""

    machine: str
    user: str
    password: str
    """As written: with a `$` in front it is what a shell makes of it."""


def credentials_file() -> Path:
    """Where enroot looks for logins."""
    config = Path(os.environ.get("XDG_CONFIG_HOME", Path.home() / ".config")) / "enroot"
    return Path(os.environ.get("ENROOT_CONFIG_PATH", config)) / ".credentials"


def logins() -> list[Login]:
    """All lines of the file; empty where there is none.

    Raises:
        ConfigError: if others can read it, or a line is none; the line is not repeated, since it may hold a key.
    """
    file = credentials_file()
    try:
        text, mode = file.read_text(encoding="utf-8"), file.stat().st_mode
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{file} can't be read ({error.strerror}): enroot takes its logins from there") from None
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError(f"{file} holds keys and can be read by others: chmod 600 {file}")
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        words = re.fullmatch(r"\s*machine\s+(\S+)\s+login\s+(\S+)\s+password\s+(.*\S)\s*", line)
        if words is None:
            raise ConfigError(f"{file} line {number}: write `machine HOST login USER password KEY`, as enroot reads it")
        found.append(Login(*words.groups()))
    return found


def look_up(name: ImageName) -> RemoteImage:
    """Ask the registry for an image, as enroot would.

    Raises:
        ConfigError: if it is not there, the login is missing or refused, or the registry can't be reached. No key is
            ever part of it.
    """
    asking = _Asking(name)
    text, digest = asking.manifest(name.reference)
    if "manifests" in (manifest := json.loads(text)):
        mine = ARCHITECTURES.get(platform.machine(), platform.machine())
        fitting = [
            one["digest"] for one in manifest["manifests"] if one.get("platform", {}).get("architecture") == mine
        ]
        if not fitting:
            raise ConfigError(f"{name} is not there for {mine}: choose another tag")
        manifest = json.loads(asking.manifest(fitting[0])[0])
    layers = {layer["digest"]: int(layer.get("size", 0)) for layer in manifest.get("layers", ())}
    return RemoteImage(digest, layers)


class _Asking:
    """A conversation with one registry about one image."""

    def __init__(self, name: ImageName) -> None:
        self._name = name
        self._url = f"{_scheme()}://{name.registry}/v2/{name.repository}"
        self._token: str | None = None
        self._login: Login | None = None
        self._lacking: str | None = None

    def manifest(self, reference: str) -> tuple[bytes, str]:
        """Its text and digest."""
        request = urllib.request.Request(f"{self._url}/manifests/{reference}", headers={"Accept": ACCEPT})
        if self._token:
            request.add_unredirected_header("Authorization", self._token)
        try:
            with self._open(request) as answer:
                return answer.read(), answer.headers.get("Docker-Content-Digest") or self._name.digest or ""
        except urllib.error.HTTPError as error:
            challenge = error.headers.get("WWW-Authenticate", "")
            if error.code == 401 and self._token is None and challenge:
                self._token = self._authorized(challenge)
                return self.manifest(reference)
            raise ConfigError(self._explained(error.code)) from None

    def _authorized(self, challenge: str) -> str:
        """What to send as Authorization, from what the registry wants."""
        kind, words = challenge.partition(" ")[0], dict(re.findall(r'(\w+)="([^"]*)"', challenge))
        listed, registry = logins(), self._name.registry.partition(":")[0]
        mine = [one for one in listed if one.machine == registry and self._name.user in (None, one.user)]
        if kind.lower() == "basic":
            self._login = mine[0] if mine else None
            return self._basic(mine[0]) if mine else ""
        realm = urllib.parse.urlsplit(words.get("realm", ""))
        if realm.scheme not in ("https", _scheme()):
            raise ConfigError(
                f"{self._name.registry} wants a login sent to {realm.geturl() or 'nowhere'}: not without https"
            )
        if mine:  # enroot takes the login of the host that gives out tokens, which may be another one
            self._login = next((one for one in listed if one.machine == realm.hostname), None)
            self._lacking = realm.hostname if self._login is None else None  # then enroot asks without a login
        query = urllib.parse.urlencode({key: words[key] for key in ("service", "scope") if key in words})
        request = urllib.request.Request(f"{words.get('realm', '')}?{query}")
        if self._login is not None:
            request.add_unredirected_header("Authorization", self._basic(self._login))
        try:
            with self._open(request) as answer:
                told: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            raise ConfigError(self._explained(error.code)) from None
        return f"Bearer {told.get('token') or told.get('access_token') or ''}"

    def _basic(self, login: Login) -> str:
        password = login.password
        if password.startswith("$"):  # such as $NGC_KEY, or a command in $( )
            done = subprocess.run(["sh", "-c", f"echo {password}"], capture_output=True, text=True, check=False)
            password = done.stdout.strip()
        if not password:
            raise ConfigError(f"{credentials_file()}: the password for {login.machine} is empty: is its variable set?")
        return "Basic " + base64.b64encode(f"{login.user}:{password}".encode()).decode()

    def _open(self, request: urllib.request.Request) -> Any:
        try:
            return urllib.request.urlopen(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError:
            raise
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ConfigError(
                f"{urllib.parse.urlsplit(request.full_url).netloc} can't be reached ({reason}): import where there is "
                "internet access, behind a proxy with HTTPS_PROXY set"
            ) from None

    def _explained(self, code: int) -> str:
        name, file = self._name, credentials_file()
        if code == 404:
            return f"{name.registry} has no {name.repository}:{name.reference}: check name and tag"
        if code in (401, 403) and self._lacking is not None:
            return (
                f"{file} has a login for {name.registry}, which sends to {self._lacking} for it: add the same line for "
                f"machine {self._lacking}"
            )
        if code in (401, 403) and self._login is None:
            also = " and the same for machine authn.nvidia.com" if name.registry == "nvcr.io" else ""
            user = "$oauthtoken" if name.registry == "nvcr.io" else "USER"
            return (
                f"{name.registry} wants a login for {name.repository}: write `machine {name.registry} login {user} "
                f"password KEY`{also} to {file}, mode 600; or check the name"
            )
        if code in (401, 403):
            return (
                f"{name.registry} refuses the login in {file} for {name.repository}: renew its key, or ask for access"
            )
        return f"{name.registry} answered {code} for {name.repository}: try again later"


def _scheme() -> str:
    """Enroot's own setting for registries of a laboratory."""
    return "http" if os.environ.get("ENROOT_ALLOW_HTTP", "").lower() in ("y", "yes", "t", "true", "1") else "https"
