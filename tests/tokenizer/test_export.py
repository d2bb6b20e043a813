"""What is exported loads elsewhere, computes the same, and appears under its name whole or not at all."""

import fcntl
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from weight_parts import released

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.tokenizer import LatentStatistics, export, export_jit, latent_statistics, load_tokenizer
from cosmos_hpc.tokenizer.haar import TAP

export_module = sys.modules["cosmos_hpc.tokenizer.export"]  # the package's attribute of that name is the function

KINDS = ["CV8x8x8", "DV8x16x16"]
FILES = ("autoencoder", "encoder", "decoder")


@cache
def load(folder: Path) -> list[torch.jit.ScriptModule]:
    """Each file once, since that takes half a second."""
    return [torch.jit.load(folder / f"{name}.jit") for name in FILES]


def is_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((found - expected).abs().max() < tolerance * expected.abs().max())


@pytest.fixture(autouse=True)
def _simple_executor():
    """TorchScript else studies the first runs of each graph for seconds."""
    with torch.jit.optimized_execution(False), torch.no_grad():
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_files_hold_the_released_names_in_their_order(exported, kind):
    assert sorted(path.name for path in exported(kind).iterdir()) == sorted(f"{name}.jit" for name in FILES)
    for name, module in zip(FILES, load(exported(kind)), strict=True):
        assert list(module.state_dict()) == [fields[0] for fields in released(f"{kind} {name}")]


@pytest.mark.parametrize("shape", [(2, 3, 1, 16, 48), (1, 3, 9, 32, 32), (2, 3, 17, 48, 16)], ids=str)
def test_continuous_files_take_and_return_what_the_released_ones_do(small, exported, shape):
    network, clips = small("CV8x8x8"), torch.rand(shape) * 2 - 1
    expected = network(clips)
    autoencoder, encoder, decoder = load(exported("CV8x8x8"))
    reconstructions, posterior, latents = autoencoder(clips)
    assert is_near(reconstructions, expected.reconstructions)
    assert is_near(latents, expected.latents)
    latents, same_posterior = encoder(clips)
    assert is_near(latents, expected.latents)
    assert [zero.tolist() for zero in (*posterior, *same_posterior)] == [[0.0]] * 4
    assert is_near(decoder(expected.latents), expected.reconstructions)


@pytest.mark.parametrize("shape", [(2, 3, 1, 16, 48), (1, 3, 9, 32, 32), (2, 3, 17, 48, 16)], ids=str)
def test_discrete_files_take_and_return_what_the_released_ones_do(small, exported, shape):
    network, clips = small("DV8x16x16"), torch.rand(shape) * 2 - 1
    expected, expected_indices = network(clips), network.encode_indices(clips)
    autoencoder, encoder, decoder = load(exported("DV8x16x16"))
    reconstructions, loss, indices = autoencoder(clips)
    assert is_near(reconstructions, expected.reconstructions)
    assert loss.equal(torch.zeros(shape[0], 1, 1, 1, shape[4] // 16))
    assert indices.equal(expected_indices)
    indices, codes, loss = encoder(clips)
    assert indices.equal(expected_indices)
    assert codes.equal(expected.latents)
    assert loss.shape == (shape[0], 1, 1, 1, shape[4] // 16)
    assert is_near(decoder(expected_indices.long()), expected.reconstructions)


@pytest.mark.parametrize("kind", KINDS)
def test_one_file_serves_every_precision(small, exported, kind):
    clips = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    autoencoder = torch.jit.load(exported(kind) / "autoencoder.jit")
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.bfloat16, 0.05)):
        network = small(kind).to(dtype)
        reconstructions = autoencoder.to(dtype)(clips.to(dtype))[0]
        assert reconstructions.dtype == dtype
        assert is_near(reconstructions, network(clips.to(dtype)).reconstructions, tolerance)


def test_bfloat16_export_holds_the_released_dtypes(small, tmp_path):
    with ThreadPoolExecutor(1) as pool:  # as for the fixture `exported`
        pool.submit(export_jit, small("CV8x8x8"), tmp_path, torch.bfloat16).result()
    for name, module in zip(FILES, load(tmp_path), strict=True):
        dtypes = {key: str(tensor.dtype).removeprefix("torch.") for key, tensor in module.state_dict().items()}
        assert list(dtypes.items()) == [(fields[0], fields[1]) for fields in released(f"CV8x8x8 {name}")]
    again = load_tokenizer(tmp_path)
    assert again.encoder.patcher3d.tap == 0.70703125  # rounded with the weights


class Exported(NamedTuple):
    """What one call left behind; several tests look at it, since its check takes seconds."""

    folder: Path
    files: list[Path]
    statistics: LatentStatistics


@pytest.fixture(scope="module")
def into_a_used_folder(small, tmp_path_factory) -> Exported:
    """CV as model.pt with statistics, where a killed export and one that still runs have been."""
    folder, network = tmp_path_factory.mktemp("used"), small("CV8x8x8")
    for left in (folder / ".export-left", folder / ".export-running"):
        left.mkdir()
        (left / "lock").touch()
    statistics = latent_statistics(network, [torch.rand(1, 3, 17, 16, 24) * 2 - 1])
    with (folder / ".export-running" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return Exported(folder, export(network, folder, "pt", statistics=statistics), statistics)


def test_export_and_import_bring_back_every_bit(small, tmp_path, into_a_used_folder):
    pytest.importorskip("safetensors")
    files = export(small("DV8x16x16"), tmp_path, "safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"] == [path.name for path in files]
    for kind, folder in (("CV8x8x8", into_a_used_folder.folder), ("DV8x16x16", tmp_path)):
        expected, found = small(kind).state_dict(), load_tokenizer(folder).state_dict()
        assert list(found) == list(expected)
        assert all(found[name].equal(expected[name]) for name in expected)


def with_taps(network, tap: float):
    taps = {name: torch.full((2,), tap) for name in network.state_dict() if name.endswith("wavelets")}
    network.load_state_dict({**network.state_dict(), **taps})
    return network


@pytest.mark.parametrize("kind", KINDS)
def test_rounded_taps_of_released_weights_survive_a_form_without_taps(small, tmp_path, kind):
    network = with_taps(small(kind), 0.70703125)
    clips = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        folder.mkdir()
        export_module._write_pt(export_module._cast_copy(network, dtype), folder)
        again = load_tokenizer(folder)
        if dtype == torch.float32:  # a network that makes its own taps has them exact
            assert again.encoder.patcher3d.tap == TAP
            assert is_near(again(clips).reconstructions, network(clips).reconstructions)
            assert not is_near(again.encoder.patcher3d(clips), network.encoder.patcher3d(clips))
        else:  # or rounded with its weights, which then stay as they were released
            assert again.encoder.patcher3d.tap == 0.70703125
            assert all(
                tensor.equal(network.state_dict()[name].bfloat16().float())
                for name, tensor in again.state_dict().items()
                if name.endswith((".weight", ".bias"))
            )


def test_export_that_computes_something_else_gets_no_name(small, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "parameters_for_own_taps", lambda network: dict(network.named_parameters()))
    with pytest.raises(ConfigError, match=r"its check failed: model\.pt, decoded differs by .* of the largest"):
        export(with_taps(small("CV8x8x8"), 0.70703125), tmp_path, "pt")
    assert list(tmp_path.iterdir()) == []


def test_statistics_of_the_latents_lie_beside_the_weights(into_a_used_folder):
    folder, files, statistics = into_a_used_folder
    assert files == [folder / "mean_std.pt", folder / "model.pt"]
    mean, std = torch.load(folder / "mean_std.pt", weights_only=True)
    assert mean.view(16, -1)[:, :3].equal(statistics.mean[:, :3])
    assert std.view(16, -1)[:, :3].equal(statistics.std[:, :3])


def test_discrete_network_has_no_statistics(small, tmp_path):
    statistics = latent_statistics(small("CV8x8x8"), [torch.zeros(1, 3, 9, 16, 16)])
    with pytest.raises(ConfigError, match=r"DV8x16x16 has no mean_std\.pt: export it without latent statistics"):
        export(small("DV8x16x16"), tmp_path, "pt", statistics=statistics)


def test_export_removes_what_a_killed_one_left_and_spares_one_that_runs(into_a_used_folder):
    names = sorted(path.name for path in into_a_used_folder.folder.iterdir())
    assert names == [".export-running", "mean_std.pt", "model.pt"]


@pytest.fixture
def diffusers():
    return pytest.importorskip("diffusers", reason="diffusers is missing: pip install 'cosmos-hpc[diffusers]'")


@pytest.mark.parametrize("kind", ["CV8x8x8", "CV4x8x8", "CV8x16x16"])
def test_diffusers_loads_its_folder_and_computes_the_same(small, diffusers, tmp_path, kind):
    network = small(kind)
    files = export(network, tmp_path, "diffusers")
    assert sorted(file.name for file in files) == ["config.json", "diffusion_pytorch_model.safetensors"]
    model, report = diffusers.AutoencoderKLCosmos.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert model.config.latents_mean is model.config.latents_std is None
    for shape in ((2, 3, 1, 32, 48), (1, 3, 9, 48, 32), (1, 3, 33, 32, 32)):
        clips = torch.rand(shape) * 2 - 1
        latents = network.encode(clips)
        assert is_near(model.encode(clips).latent_dist.mode(), latents)
        assert is_near(model.decode(latents).sample, network.decode(latents))


def test_diffusers_folder_holds_the_statistics_that_pipelines_read(small, diffusers, tmp_path):
    network = small("CV8x8x8")
    statistics = latent_statistics(network, [torch.rand(1, 3, 17, 16, 24) * 2 - 1])
    files = export(network, tmp_path, "diffusers", torch.bfloat16, statistics)
    assert sorted(file.name for file in files) == ["config.json", "diffusion_pytorch_model.safetensors", "mean_std.pt"]
    model = diffusers.AutoencoderKLCosmos.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.tensor(model.config.latents_mean).view(16, 16).equal(statistics.mean)
    assert torch.tensor(model.config.latents_std).view(16, 16).equal(statistics.std)


def test_rounded_taps_of_released_weights_reach_diffusers(small, diffusers, tmp_path):
    network = with_taps(small("CV8x8x8"), 0.70703125)
    export(network, tmp_path, "diffusers")
    clips = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    model = diffusers.AutoencoderKLCosmos.from_pretrained(tmp_path)
    latents = network.encode(clips)
    assert not is_near(small("CV8x8x8").encode(clips), latents)
    assert is_near(model.encode(clips).latent_dist.mode(), latents)
    assert is_near(model.decode(latents).sample, network.decode(latents))


def test_diffusers_is_asked_for_by_its_line_and_has_no_discrete_network(small, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="diffusers has no network for DV8x16x16: export DV to jit, pt or safetensor"):
        export(small("DV8x16x16"), tmp_path, "diffusers")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"run `pip install 'cosmos-hpc\[diffusers\]'`"):
        export(small("CV8x8x8"), tmp_path, "diffusers")
    assert list(tmp_path.iterdir()) == []


def test_unknown_form_names_the_known_ones(small, tmp_path):
    with pytest.raises(ConfigError, match="'onnx' is no form to export to: take jit, pt, safetensors, diffusers"):
        export(small("CV8x8x8"), tmp_path, "onnx")


def test_folder_that_can_not_be_written_is_told_in_one_line(small, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file can't be written \(File exists\): free some space, or name another"):
        export(small("CV8x8x8"), tmp_path / "file", "pt")

    def fill_the_disk(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:659] . PytorchStreamWriter failed writing file")

    monkeypatch.setattr(export_module, "_write_pt", fill_the_disk)
    with pytest.raises(ConfigError, match=r"out can't be written \(.*failed writing file\): free some space"):
        export(small("CV8x8x8"), tmp_path / "out", "pt")
    monkeypatch.setattr(export_module, "ROOM_BYTES", 2**80)
    with pytest.raises(ConfigError, match=r"out can't be written \(\d+ MiB are free, \d+ MiB are needed\): free some"):
        export(small("CV8x8x8"), tmp_path / "out", "jit")
    assert list((tmp_path / "out").iterdir()) == []


def test_killed_export_leaves_nothing_under_the_final_names(tmp_path):
    program = (
        "from pathlib import Path; from cosmos_hpc.config.schema import ModelConfig;"
        "from cosmos_hpc.tokenizer import build_tokenizer, export_jit;"
        f"export_jit(build_tokenizer(ModelConfig(model='CV8x8x8', channels=4)), Path({str(tmp_path)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", program])
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".export-*/files/encoder.jit")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob(".export-*/files/*.jit"))
    assert list(tmp_path.glob("*.jit")) == []
    with export_module._hidden_folder(tmp_path):  # as the next export begins
        assert list(tmp_path.glob(".export-*/files/*.jit")) == []
    assert list(tmp_path.iterdir()) == []
