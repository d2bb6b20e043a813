"""Asking a registry for an image, against a small one on 127.0.0.1."""

import dataclasses

import pytest
from small_registry import LOGIN, SmallRegistry, served

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.launch.image_import import find
from cosmos_hpc.launch.images import ImageName
from cosmos_hpc.launch.registry import credentials_file, logins, look_up

KEY = LOGIN.partition(":")[2]


@pytest.fixture
def registry(monkeypatch, tmp_path):
    monkeypatch.setenv("ENROOT_ALLOW_HTTP", "yes")
    monkeypatch.setenv("ENROOT_CONFIG_PATH", str(tmp_path))
    with served() as registry:
        yield registry


def write_credentials(text, mode=0o600):
    credentials_file().write_text(text)
    credentials_file().chmod(mode)


def name_in(registry: SmallRegistry, tag: str = "1.0") -> ImageName:
    return ImageName.of(f"docker://{registry.host}#lab/base:{tag}")


def test_an_image_has_a_digest_and_layers(registry):
    found = look_up(name_in(registry))
    assert found.digest.startswith("sha256:")
    assert found.size == sum(len(registry.blobs[layer]) for layer in found.layers) > 0
    assert look_up(dataclasses.replace(name_in(registry), digest=found.digest)) == found


@pytest.mark.parametrize("password", [KEY, "$KEY_OF_A_TEST", "$(printenv KEY_OF_A_TEST)"])
def test_enroots_own_login_opens_a_private_image(registry, monkeypatch, password):
    registry.wants_login = True
    monkeypatch.setenv("KEY_OF_A_TEST", KEY)
    write_credentials(f"# of the team\nmachine 127.0.0.1 login $oauthtoken password {password}\n")
    assert look_up(name_in(registry)).size > 0
    assert not [line for line in registry.asked if "/manifests/" in line and "Basic" in line]


@pytest.mark.parametrize(
    ("credentials", "mode", "words"),
    [
        (
            None,
            0o600,
            r"wants a login for lab/base: write `machine 127.0.0.1:\d+ login USER password KEY` to .*mode 600",
        ),
        ("machine 127.0.0.1 login u password wrong-key-of-a-test", 0o600, "refuses the login in .*: renew its key"),
        (
            "machine 127.0.0.1 login u password $UNSET_KEY",
            0o600,
            "password for 127.0.0.1 is empty: is its variable set",
        ),
        ("machine 127.0.0.1 login u password k", 0o644, "can be read by others: chmod 600"),
        (
            "machine 127.0.0.1 password wrong-key-of-a-test",
            0o600,
            "line 1: write `machine HOST login USER password KEY`",
        ),
    ],
)
def test_a_login_that_would_fail_in_the_queue_is_refused_before_without_its_key(registry, credentials, mode, words):
    registry.wants_login = True
    if credentials is not None:
        write_credentials(credentials + "\n", mode)
    with pytest.raises(ConfigError, match=words) as refusal:
        look_up(name_in(registry))
    assert "key-of-a-test" not in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_login_for_the_registry_alone_is_not_enough_where_another_host_gives_out_tokens(registry):
    registry.wants_login = True
    registry.realm_host = "localhost"
    write_credentials(f"machine 127.0.0.1 login $oauthtoken password {KEY}\n")
    with pytest.raises(ConfigError, match="add the same line for machine localhost"):
        look_up(name_in(registry))
    write_credentials(
        "".join(f"machine {host} login $oauthtoken password {KEY}\n" for host in ("127.0.0.1", "localhost"))
    )
    assert look_up(name_in(registry)).size > 0


def test_what_is_not_there_and_what_can_not_be_reached_are_told_apart(registry):
    with pytest.raises(ConfigError, match=r"has no lab/base:2.0: check name and tag"):
        look_up(name_in(registry, "2.0"))
    with pytest.raises(ConfigError, match=r"127.0.0.1:1 can't be reached .*HTTPS_PROXY"):
        look_up(ImageName.of("docker://127.0.0.1:1#lab/base"))


def test_a_pinned_digest_is_asked_for_rather_than_the_tag(registry, tmp_path):
    older = registry.push("lab/base:moved", {"srv/hello": b"older\n"})
    newer = registry.push("lab/base:moved", {"srv/hello": b"newer\n"})
    text = f"docker://{registry.host}#lab/base:moved"
    assert find(text, tmp_path).remote.digest == newer
    assert find(text, tmp_path, older).remote.digest == older
    assert find(f"{text}@{older}", tmp_path).remote.digest == older


def test_no_file_means_no_logins(registry):
    assert logins() == []
