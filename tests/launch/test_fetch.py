"""The real client of Hugging Face against a server on 127.0.0.1, each fetch in a process of its own.

The client reads HF_ENDPOINT and HF_HOME at its import, hence the processes.
"""

import hashlib
import json
import os
import pty
import shutil
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import COMMIT, GOOD_TOKEN, Hub, Repository, serving

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.launch.fetch import repository_id

TOKENIZER = "nvidia/Cosmos-1.0-Tokenizer-CV8x8x8"
PUBLISHED = "nvidia/Cosmos-Tokenize1-CV8x8x8-720p"
AUTOENCODER = bytes(range(256)) * 2000
TOKENIZER_FILES = {
    "autoencoder.jit": AUTOENCODER,
    "encoder.jit": b"E" * 3000,
    "decoder.jit": b"D" * 3000,
    "mean_std.pt": b"S" * 100,
    "config.json": b"{}",
}
UNWANTED = {"README.md": b"text", "model-00001-of-00002.safetensors": b"x" * 50, "nemo/model.pt": b"y" * 50}

CLIENT = """
import json, sys
from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.launch import fetch
try:
    result = getattr(fetch, sys.argv[1])(*json.loads(sys.argv[2]), **json.loads(sys.argv[3]))
except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
finally:
    assert "torch" not in sys.modules, "torch was imported"
print(json.dumps(result, default=str))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    repositories = {
        TOKENIZER: Repository(TOKENIZER_FILES | UNWANTED),
        "nvidia/gated": Repository({"autoencoder.jit": b"A" * 1000}, is_gated=True),
        "acme/text": Repository({"README.md": b"text", "config.json": b"{}"}),
        PUBLISHED: Repository({"autoencoder.jit": b"not what was published"}),
        "timm/vgg16.tv_in1k": Repository({"model.safetensors": b"V" * 500, "pytorch_model.bin": b"P"}),
        "acme/flow": Repository({"raft/large.pth": b"R" * 700, "small.pth": b"S", "model.safetensors": b"M"}),
    }
    with serving(Hub(repositories)) as hub:
        yield hub


class Client:
    """One user: a cache, perhaps a token, and processes that fetch."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.hub, self.home, self.token = hub, home, ""
        self.environment: dict[str, str] = {}

    def command(self, function: str, *args: str, **options: object) -> list[str]:
        return [sys.executable, "-c", CLIENT, function, json.dumps(args), json.dumps(options)]

    def variables(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        own = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.home), "HF_TOKEN": self.token}
        quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
        return kept | own | quiet | self.environment

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(command, env=self.variables(), capture_output=True, text=True, timeout=60)
        assert not self.token or self.token not in result.stdout + result.stderr
        return result

    def succeeds(self, function: str, *args: str, **options: object):
        result = self.run(*self.command(function, *args, **options))
        assert (result.returncode, result.stderr) == (0, "")
        return json.loads(result.stdout)

    def refusal(self, function: str, *args: str, **options: object) -> str:
        result = self.run(*self.command(function, *args, **options))
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        return result.stderr.strip().removeprefix("error: ")


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Client:
    return Client(hub, tmp_path / "hf")


def closed(hub: Hub) -> None:
    """Point the client to a port that refuses."""
    with serving(Hub({})) as gone:
        pass
    hub.url = gone.url


def test_only_wanted_files_are_fetched_whole(client, hub):
    folder, commit, files, networks = client.succeeds("fetch", "Cosmos-1.0-Tokenizer-CV8x8x8")
    assert commit == COMMIT
    assert networks == []
    assert {Path(file).relative_to(folder).as_posix() for file in files} == set(TOKENIZER_FILES)
    assert {path.name for path in Path(folder).rglob("*") if path.is_file()} == set(TOKENIZER_FILES)
    assert all((Path(folder) / name).read_bytes() == content for name, content in TOKENIZER_FILES.items())
    assert Path(folder).is_relative_to(client.home)
    assert len(hub.downloads()) == len(TOKENIZER_FILES)


def test_second_fetch_downloads_nothing_and_the_cache_serves_jobs_without_a_server(client, hub):
    folder = client.succeeds("fetch", TOKENIZER, revision="v1")[0]
    hub.requests.clear()
    assert client.succeeds("fetch", TOKENIZER)[0] == folder
    assert hub.downloads() == []
    hub.requests.clear()
    assert client.succeeds("cached", TOKENIZER) == folder
    assert hub.requests == []
    closed(hub)
    assert client.succeeds("cached", "Cosmos-1.0-Tokenizer-CV8x8x8", "v1") == folder
    assert "can't be reached" in client.refusal("fetch", TOKENIZER)


def test_loss_networks_come_with_the_weights_and_are_cached_under_their_own_name(client):
    files = client.succeeds("fetch", TOKENIZER, loss_networks=True)[3]
    assert [Path(file).name for file in files] == ["model.safetensors"]
    assert str(Path(files[0]).parent) == client.succeeds("cached", "timm/vgg16.tv_in1k")


def test_any_file_of_any_repository_can_be_a_loss_network(client, hub):
    networks = {"vgg16": "acme/flow", "raft": "acme/flow:raft/large.pth"}
    files = client.succeeds("fetch", TOKENIZER, **networks)[3]
    assert [Path(file).read_bytes() for file in files] == [b"M", b"R" * 700]
    assert not [request for request in hub.requests if "small.pth" in request.path or "timm" in request.path]
    closed(hub)
    assert [client.succeeds("cached_network", name) for name in networks.values()] == files
    message = client.refusal("cached_network", "acme/flow:small.pth")
    assert "acme/flow:small.pth is not in the Hugging Face cache" in message
    assert "run `cosmos-hpc fetch` with --loss-networks (or --vgg16, --raft) on the login node first" in message


def test_a_loss_network_that_is_not_there_names_the_place_to_choose_from(client, hub):
    message = client.refusal("fetch", TOKENIZER, raft="acme/flow:raft_large.pth")
    assert message == f"{hub.url}/acme/flow holds no raft_large.pth: choose a file from {hub.url}/acme/flow/tree/main"
    hub.requests.clear()
    assert "names no file: name one such as" in client.refusal("fetch", TOKENIZER, raft="acme/flow:../secret")
    assert "is no repository on Hugging Face" in client.refusal("fetch", TOKENIZER, raft="raft large")
    assert hub.requests == []


def test_what_was_not_fetched_names_the_command_that_fetches_it(client, hub):
    message = client.refusal("cached", TOKENIZER, "v1")
    assert f"{TOKENIZER} at v1 is not in the Hugging Face cache {client.home}/hub" in message
    assert f"run `cosmos-hpc fetch {TOKENIZER} --revision v1` on the login node first" in message
    assert hub.requests == []


def test_a_fetch_that_ended_early_is_no_cached_tokenizer_until_it_is_finished(client, hub):
    hub.sent_instead["mean_std.pt"] = b"short"
    client.refusal("fetch", TOKENIZER)
    assert "run `cosmos-hpc fetch" in client.refusal("cached", TOKENIZER)
    hub.sent_instead.clear()
    hub.requests.clear()
    client.succeeds("fetch", TOKENIZER)
    assert [Path(request.path).name for request in hub.downloads()] == ["mean_std.pt"]
    client.succeeds("cached", TOKENIZER)


def test_connection_cut_in_mid_file_resumes_where_it_broke(client, hub):
    mib = 2**20
    content = os.urandom(24 * mib)
    hub.repositories[TOKENIZER].files["autoencoder.jit"] = content
    hub.cut_after["autoencoder.jit"] = [11 * mib, 12 * mib]
    folder = client.succeeds("fetch", TOKENIZER)[0]
    transfers = [request.byte_range for request in hub.downloads() if request.path.endswith("autoencoder.jit")]
    assert transfers == [None, f"bytes={10 * mib}-", f"bytes={20 * mib}-"]  # the client writes 10 MiB at a time
    assert (Path(folder) / "autoencoder.jit").read_bytes() == content


def test_connection_that_keeps_breaking_is_told(client, hub):
    hub.cut_after["autoencoder.jit"] = [1000] * 6
    message = client.refusal("fetch", TOKENIZER)
    assert f"{hub.url} can't be reached (peer closed connection" in message
    assert message.endswith("finished files are kept")


def test_transfer_of_another_size_is_refused(client, hub):
    hub.sent_instead["autoencoder.jit"] = AUTOENCODER[:-1]
    message = client.refusal("fetch", TOKENIZER)
    assert "file should be of size 512000 but has size 511999" in message
    assert message.endswith("run it again; finished files are kept")


def test_transfer_of_other_bytes_is_refused_and_not_kept(client, hub):
    hub.sent_instead["autoencoder.jit"] = AUTOENCODER[:-1] + b"?"
    message = client.refusal("fetch", TOKENIZER)
    assert (
        "autoencoder.jit was damaged (its SHA-256 is not the repository's) and was removed: fetch it again" in message
    )
    assert "run `cosmos-hpc fetch" in client.refusal("cached", TOKENIZER)
    hub.sent_instead.clear()
    folder = client.succeeds("fetch", TOKENIZER)[0]
    assert (Path(folder) / "autoencoder.jit").read_bytes() == AUTOENCODER


def test_file_cut_short_in_the_cache_is_found_and_fetched_anew(client):
    file = Path(client.succeeds("fetch", TOKENIZER)[0]) / "autoencoder.jit"
    os.truncate(file, 1000)
    assert "had 1000 bytes in place of 512000 and was removed: fetch it again" in client.refusal("fetch", TOKENIZER)
    client.succeeds("fetch", TOKENIZER)
    assert file.read_bytes() == AUTOENCODER


def test_published_checksum_is_compared(client):
    message = client.refusal("fetch", PUBLISHED)
    found = hashlib.md5(b"not what was published").hexdigest()
    assert f"had the MD5 sum {found}, but NVIDIA published 7f658580d5cf617ee1a1da85b1f51f0d" in message
    assert "--revision" in message


def test_gated_repository_without_a_token_tells_where_to_accept_and_how_to_log_in(client, hub):
    assert client.refusal("fetch", "nvidia/gated") == (
        f"nvidia/gated is gated: accept its licence at {hub.url}/nvidia/gated, then log in with "
        "`hf auth login` or HF_TOKEN"
    )


def test_gated_repository_with_another_users_token_asks_for_access(client, hub):
    client.token = "hf_anotherUsersToken"
    message = client.refusal("fetch", "nvidia/gated")
    assert message.startswith("nvidia/gated is gated and your token has no access: accept its licence at")
    assert message.endswith("or give another token with `hf auth login` or HF_TOKEN")


def test_gated_repository_opens_to_the_right_token_and_the_token_is_kept_nowhere(client):
    client.token = GOOD_TOKEN
    client.succeeds("fetch", "gated")
    assert all(GOOD_TOKEN.encode() not in path.read_bytes() for path in client.home.rglob("*") if path.is_file())
    client.token = ""
    client.succeeds("cached", "gated")


def test_token_that_is_refused_or_can_not_be_sent_is_told(client, hub):
    client.token = "hf_Invalid"
    assert f"{hub.url} wants a valid token (401): give one" in client.refusal("fetch", TOKENIZER)
    client.token = "hf_töken"
    assert "holds a character that no request can carry" in client.refusal("fetch", TOKENIZER)


@pytest.mark.parametrize("token", ["", GOOD_TOKEN])
def test_wrong_name_is_told(client, hub, token):
    client.token = token
    message = client.refusal("fetch", "nvidia/Cosmos-Tokenizr")
    assert message.startswith(f"{hub.url}/nvidia/Cosmos-Tokenizr does not exist, or is private: check the name")


def test_wrong_revision_is_told(client, hub):
    assert client.refusal("fetch", TOKENIZER, revision="v7") == (
        f"{TOKENIZER} has no revision v7: choose a branch, tag or commit from {hub.url}/{TOKENIZER}/commits/main"
    )


def test_repository_without_weights_is_refused(client):
    message = client.refusal("fetch", "acme/text")
    assert "holds none of autoencoder.jit, encoder.jit with decoder.jit, model.safetensors, model.pt: name" in message


def test_endpoint_that_refuses_is_told(client, hub):
    closed(hub)
    message = client.refusal("fetch", TOKENIZER)
    assert f"{hub.url} can't be reached (" in message
    assert "run this where there is internet access, behind a proxy with HTTPS_PROXY set" in message


def test_no_network_is_told(client):
    client.environment["HF_ENDPOINT"] = "http://no-such-host.invalid"
    isolated = [] if shutil.which("unshare") is None else ["unshare", "-rn"]  # no look-up leaves the machine
    if not isolated or subprocess.run([*isolated, "true"], capture_output=True).returncode:
        pytest.skip("no network namespace can be made here (unshare -rn)")
    result = client.run(*isolated, *client.command("fetch", TOKENIZER))
    assert result.stderr.startswith("error: http://no-such-host.invalid can't be reached (")
    assert result.stderr.count("\n") == 1


def test_server_that_is_down_is_told(client, hub):
    hub.status = 503
    assert "the server answered 503: run it again later" in client.refusal("fetch", TOKENIZER)


def test_offline_switch_is_told(client):
    client.environment["HF_HUB_OFFLINE"] = "1"
    assert "while HF_HUB_OFFLINE is set: unset it on the login node" in client.refusal("fetch", TOKENIZER)


def test_full_disk_is_told(client):
    client.home.mkdir()
    mount = 'mount -t tmpfs -o size=256k none "$HF_HOME" && exec "$@"'
    inside = ["unshare", "-rm", "sh", "-c", mount, "sh"]
    if shutil.which("unshare") is None or subprocess.run([*inside, "true"], env=client.variables()).returncode:
        pytest.skip("no tmpfs can be mounted here (unshare -rm)")
    result = client.run(*inside, *client.command("fetch", TOKENIZER))
    assert result.stderr == (
        f"error: {client.home}/hub is full, so {TOKENIZER} can't be fetched: "
        "free some space, or set HF_HOME to a folder with room\n"
    )


def test_cache_that_can_not_be_written_is_told(client):
    client.home.write_text("a file where the folder should be")
    assert "can't be written (" in (message := client.refusal("fetch", TOKENIZER))
    assert message.endswith("set HF_HOME to a folder of yours")


def test_a_bar_is_shown_on_a_terminal(client):
    main, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    process = subprocess.Popen(
        client.command("fetch", TOKENIZER), env=client.variables(), stdout=subprocess.DEVNULL, stderr=terminal
    )
    os.close(terminal)
    shown = b""
    try:
        while chunk := os.read(main, 4096):
            shown += chunk
    except OSError:  # how a terminal says that its other end is closed
        pass
    os.close(main)
    assert process.wait() == 0
    assert b"Fetching 5 files: 100%" in shown


def test_names_without_an_organisation_are_nvidias():
    assert repository_id("Cosmos-1.0-Tokenizer-CV8x8x8") == TOKENIZER
    assert repository_id("acme/tokenizer_v2") == "acme/tokenizer_v2"


@pytest.mark.parametrize("name", ["", "/no/weights", "./weights", "a/b/c", "acme/", "../up", "acme/a--b", "acme/é"])
def test_what_can_not_be_a_repository_is_refused_at_once(name):
    with pytest.raises(ConfigError, match=r"is no repository on Hugging Face: name one such as Cosmos-1\.0"):
        repository_id(name)
