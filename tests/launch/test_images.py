import dataclasses
import json

import pytest

from cosmos_hpc.config.container_schema import ContainerConfig
from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.launch.images import ImageName, Manifest, manifest_file, read_manifest, squashfs_of

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("written", "name", "uri"),
    [
        ("nvcr.io/nvidia/nemo:25.02", "nvcr.io/nvidia/nemo:25.02", "docker://nvcr.io#nvidia/nemo:25.02"),
        ("docker://nvcr.io/nvidia/nemo:25.02", "nvcr.io/nvidia/nemo:25.02", "docker://nvcr.io#nvidia/nemo:25.02"),
        ("nvcr.io#nvidia/nemo:25.02", "nvcr.io/nvidia/nemo:25.02", "docker://nvcr.io#nvidia/nemo:25.02"),
        (
            "docker://$oauthtoken@nvcr.io#nvidia/nemo",
            "nvcr.io/nvidia/nemo:latest",
            "docker://$oauthtoken@nvcr.io#nvidia/nemo:latest",
        ),
        (
            f"nvcr.io/nvidia/nemo:25.02@{DIGEST}",
            "nvcr.io/nvidia/nemo:25.02",
            f"docker://nvcr.io#nvidia/nemo:{DIGEST}",
        ),
        (
            "ubuntu:22.04",
            "registry-1.docker.io/library/ubuntu:22.04",
            "docker://registry-1.docker.io#library/ubuntu:22.04",
        ),
        ("nvidia/cuda:12", "registry-1.docker.io/nvidia/cuda:12", "docker://registry-1.docker.io#nvidia/cuda:12"),
        ("docker://127.0.0.1:5055#lab/base:1.0", "127.0.0.1:5055/lab/base:1.0", "docker://127.0.0.1:5055#lab/base:1.0"),
    ],
)
def test_an_image_is_named_as_people_write_it_and_asked_for_as_enroot_wants_it(written, name, uri):
    found = ImageName.of(written)
    assert (str(found), found.enroot_uri) == (name, uri)
    assert "/" not in found.file_stem
    assert ":" not in found.file_stem


@pytest.mark.parametrize("written", ["", "two words", "Nvidia/Nemo", "/shared/nemo", "nvcr.io/nvidia/nemo@sha256:12"])
def test_what_names_no_image_is_refused(written):
    with pytest.raises(ConfigError, match="names no image: write one such as"):
        ImageName.of(written)


def put_image(folder, stem, **known):
    """A squashfs file as far as lookups go, with its manifest."""
    manifest = Manifest(
        **{
            "name": "nvcr.io/nvidia/nemo:25.02",
            "digest": DIGEST,
            "size": 4,
            "imported": "2026-01-01T00:00:00+0000",
            "made_by": "4.1.2",
        }
        | known
    )
    file = folder / f"{stem}.sqsh"
    file.write_bytes(b"hsqs")
    manifest_file(file).write_text(json.dumps(dataclasses.asdict(manifest)))
    return file


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.setenv("COSMOS_HPC_IMAGES", str(tmp_path))
    return tmp_path


def test_a_name_leads_to_what_was_imported_last_under_it_and_a_digest_to_its_own(images):
    older = put_image(images, "b", imported="2026-01-01T00:00:00+0000")
    newer = put_image(images, "a", imported="2026-02-01T00:00:00+0000", digest=DIGEST.replace("a", "b"))
    put_image(images, "c", name="nvcr.io/nvidia/nemo:25.04", imported="2026-03-01T00:00:00+0000")

    def lies(**settings):
        return squashfs_of(ContainerConfig(mode="enroot", **settings))

    assert lies(image="nvcr.io#nvidia/nemo:25.02") == newer
    assert lies(image="nvcr.io/nvidia/nemo:25.02", digest=DIGEST) == older
    assert lies(image=f"nvcr.io/nvidia/nemo:25.02@{DIGEST}") == older
    assert lies(image="nvcr.io/nvidia/nemo:25.06") is None
    assert lies(image="/shared/own.sqsh").as_posix() == "/shared/own.sqsh"
    (images / "cosmos-hpc.sqsh").write_bytes(b"hsqs")
    assert lies(image="images/cosmos-hpc.sqsh") == images / "cosmos-hpc.sqsh"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"name": "x"}'])
def test_a_broken_manifest_counts_as_none(images, text):
    file = put_image(images, "a")
    assert read_manifest(file).digest == DIGEST
    manifest_file(file).write_text(text)
    assert read_manifest(file) is None
