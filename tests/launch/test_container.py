import pytest

from cosmos_hpc.config.schema import ContainerConfig
from cosmos_hpc.launch.container import container_prefix


def test_without_a_container_nothing_stands_before_the_command():
    assert container_prefix(ContainerConfig(), ("/data:/data",)) == ([], [])


@pytest.mark.parametrize(
    ("image", "uri"),
    [
        ("/shared/nemo.sqsh", "/shared/nemo.sqsh"),
        ("nemo.sqsh", "./nemo.sqsh"),
        ("nvcr.io/nvidia/nemo:25.02", "nvcr.io#nvidia/nemo:25.02"),
        ("docker://nvcr.io/nvidia/nemo:25.02", "nvcr.io#nvidia/nemo:25.02"),
        ("nvcr.io#nvidia/nemo:25.02", "nvcr.io#nvidia/nemo:25.02"),
        ("ubuntu:22.04", "ubuntu:22.04"),
    ],
)
def test_pyxis_takes_images_as_people_write_them(image, uri):
    container = ContainerConfig(mode="pyxis", image=image, mounts=("/data:/data:ro",), environment={"A": "b"})
    flags, command = container_prefix(container, ("/run:/run",))
    assert command == []
    assert f"--container-image={uri}" in flags
    assert "--container-mounts=/run:/run,/data:/data:ro" in flags
    assert "--container-env=A" in flags


def test_plain_enroot_mounts_and_names_variables_without_their_values():
    container = ContainerConfig(mode="enroot", image="nemo", mounts=("/data:/data",), environment={"FLAVOR": "secret"})
    flags, command = container_prefix(container, ("/run:/run",))
    assert flags == []
    assert command[:2] == ["bash", "-c"]
    assert "--mount /run:/run --mount /data:/data nemo" in command[2]
    assert "FLAVOR" in command[2]
    assert "secret" not in " ".join(command)
