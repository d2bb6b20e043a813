"""Weights go in strictly, from every form, and from no file that could run code."""

import os
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from weight_parts import FORMS, released, save_trace, without_program, write_checkpoint

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.schema import ModelConfig
from cosmos_hpc.tokenizer import build_tokenizer, load_tokenizer, load_weights, starting_tokenizer
from cosmos_hpc.tokenizer.architecture import Architecture
from cosmos_hpc.tokenizer.build import build
from cosmos_hpc.tokenizer.weights import dead_tensors

KINDS = ["CV8x8x8", "DV8x16x16"]
VARIANTS = [
    *(Architecture.of(ModelConfig(model=name, channels=4)) for name in ("CV4x8x8", "CV8x16x16", "DV4x8x8", "DV8x8x8")),
    Architecture(kind="CV", temporal_compression=4, patch_size=2, channels=4),
    Architecture(kind="DV", temporal_compression=4, patch_size=2, channels=4, upsamples_time_first=True),
]


def equal(one, other) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(
        first[name].equal(second[name]) and first[name].dtype == second[name].dtype for name in first
    )


def fields(tensors) -> list[list[str]]:
    """As `released` has them."""
    return [
        [name, str(tensor.dtype).removeprefix("torch."), "x".join(map(str, tensor.shape))]
        for name, tensor in tensors.items()
    ]


def dead(network) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in dead_tensors(network.architecture)}


def save(tensors, folder: Path) -> Path:
    torch.save(tensors, folder / "model.pt")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_is_the_released_one(kind):
    with torch.device("meta"):
        tensors = build_tokenizer(ModelConfig(model=kind)).state_dict()
    assert fields(tensors) == released(f"{kind} state_dict")


@pytest.mark.parametrize("kind", KINDS)
def test_dead_tensors_are_those_of_the_older_release(kind):
    with torch.device("meta"):
        tensors = dead(build_tokenizer(ModelConfig(model=kind)))
    assert sorted(fields(tensors)) == sorted(released(f"{kind} dead"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_brings_back_every_bit(small, weights_in, kind, form):
    assert equal(load_tokenizer(weights_in(form, kind)), small(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_starts_from_the_weights_that_it_names(small, weights_in, kind):
    model = ModelConfig(model=kind, channels=4, jit_ckpt_pth=str(weights_in("autoencoder.jit", kind)))
    assert equal(starting_tokenizer(model, seed=9), small(kind))


@pytest.mark.parametrize("form", ["run", "model.pt of cosmos-predict1"])
def test_averages_take_the_place_of_the_weights_where_asked_for(small, weights_in, form):
    network = small("DV8x16x16")
    constants = {name for name, _ in network.named_buffers()}
    expected = {name: t if name in constants else t * 0.5 for name, t in network.state_dict().items()}
    found = load_tokenizer(weights_in(form, "DV8x16x16"), ema=True).state_dict()
    assert all(found[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize("form", ["autoencoder.jit", "model.pt with a state dict", "model.safetensors"])
def test_weights_without_averages_say_so(weights_in, form):
    with pytest.raises(ConfigError, match=r"holds no averaged weights \(EMA\): leave --ema out, or name a run"):
        load_tokenizer(weights_in(form, "CV8x8x8"), ema=True)


def test_a_parameter_without_its_average_is_missing(small, tmp_path):
    tensors = small("CV8x8x8").state_dict()
    some = {f"ema.{name}": tensors[name] for name in tensors if "decoder" in name}
    dcp.save({f"model.{name}": tensor for name, tensor in tensors.items()} | some, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(ConfigError, match=r"lacks tensors by which .*encoder\.conv_in|it lacks encoder\.conv_in"):
        load_tokenizer(tmp_path, ema=True)


@pytest.mark.parametrize(
    "architecture", VARIANTS, ids=lambda a: f"{a.name}-patch{a.patch_size}-{a.upsamples_time_first}"
)
def test_every_variant_is_told_by_its_tensors(tmp_path, architecture):
    network = build(architecture)
    assert load_tokenizer(save(network.state_dict(), tmp_path)).architecture == architecture


@pytest.mark.parametrize("kind", KINDS)
def test_dead_tensors_of_the_older_release_are_passed_over(small, tmp_path, kind):
    network = small(kind)
    extra = dead(network)
    assert equal(load_tokenizer(save(network.state_dict() | extra, tmp_path)), network)
    name = next(iter(extra))
    with pytest.raises(ConfigError, match=f"it also has {name}"):
        load_weights(network, save(network.state_dict() | {name: torch.zeros(3)}, tmp_path))


def test_name_of_the_folder_tells_what_dead_tensors_hide(small, tmp_path):
    network = small("CV4x8x8")
    folder = tmp_path / "Cosmos-0.1-Tokenizer-CV4x8x8"
    folder.mkdir()
    save(
        network.state_dict() | {name: torch.zeros(shape) for name, shape in dead_tensors(network.architecture)}, folder
    )
    assert equal(load_tokenizer(folder), network)


def test_weights_of_another_network_are_refused_by_the_names_of_their_tensors(small, tmp_path):
    with pytest.raises(ConfigError) as refusal:
        load_weights(small("CV8x8x8"), save(small("DV8x16x16").state_dict(), tmp_path))
    beginning, problems, mend = re.split(": it |\\. (?=Name)", str(refusal.value))
    assert beginning == f"{tmp_path} does not fit CV8x8x8 with 4 channels"
    assert problems.startswith("also has quantizer._levels, quantizer._basis, quantizer.implicit_codebook; it has in")
    assert "quant_conv.conv3d.weight [6, 16, 1, 1, 1] (not [16, 16, 1, 1, 1])" in problems
    assert mend.startswith("Name the weights of that tokenizer, or set model.model")


CHANGES = {
    "it lacks decoder.norm_out.norm.bias": lambda tensors: tensors.pop("decoder.norm_out.norm.bias"),
    "it also has decoder.extra": lambda tensors: tensors.update({"decoder.extra": torch.zeros(1)}),
    r"in another shape quant_conv.conv3d.bias \[5\] \(not \[6\]\)": lambda tensors: tensors.update(
        {"quant_conv.conv3d.bias": torch.zeros(5)}
    ),
    "not finite in decoder.norm_out.norm.bias": lambda tensors: tensors["decoder.norm_out.norm.bias"].fill_(torch.nan),
    "constants of another tokenizer in quantizer._levels": lambda tensors: tensors["quantizer._levels"].fill_(7),
}


@pytest.mark.parametrize("problem", CHANGES)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(small, tmp_path, problem):
    tensors = {
        name: tensor.clone() + 1 if "mid" in name else tensor.clone()
        for name, tensor in small("DV8x16x16").state_dict().items()
    }
    CHANGES[problem](tensors)
    network = small("DV8x16x16")
    with pytest.raises(ConfigError, match=problem):
        load_weights(network, save(tensors, tmp_path))
    assert equal(network, small("DV8x16x16"))


def test_rounded_taps_of_a_bfloat16_file_set_the_filters(small, tmp_path):
    tensors = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor
        for name, tensor in small("CV8x8x8").state_dict().items()
    }
    network = load_tokenizer(save(tensors, tmp_path))
    assert network.encoder.patcher3d.tap == network.decoder.unpatcher3d.tap == 0.70703125
    assert network.encoder.patcher3d.wavelets.dtype == torch.float32


def test_places_without_weights_say_what_to_name(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere does not exist: name a folder with autoencoder\.jit"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"holds no weights: put autoencoder\.jit"):
        load_tokenizer(tmp_path)
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(ConfigError, match=r"name one that ends in \.jit, \.safetensors or \.pt"):
        load_tokenizer(tmp_path / "notes.txt")
    save({"fc.weight": torch.zeros(3, 3)}, tmp_path)
    with pytest.raises(ConfigError, match=r"lacks tensors by which .* is known, 'encoder\.conv_in\.0\.conv3d\.weight'"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(ConfigError, match="is a run without a checkpoint yet: wait"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("form", ["autoencoder.jit", "model.pt with a state dict", "model.safetensors", "checkpoint"])
@pytest.mark.parametrize("damage", ["empty", "cut short", "not weights", "one bit"])
def test_damaged_files_are_refused_in_one_line(weights_in, form, damage):
    if "safetensors" in form and damage == "one bit":
        pytest.skip("the format has no checksum")
    source = weights_in(form, "CV8x8x8")
    file = max(source.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    if damage == "one bit":
        content[len(content) // 2] ^= 1
    changed = {
        "empty": b"",
        "cut short": content[: len(content) // 2],
        "not weights": b"<html>" * 99,
        "one bit": content,
    }
    file.write_bytes(changed[damage])
    with pytest.raises(ConfigError, match=r"can't be read as weights \(.+\): fetch or export it again") as refusal:
        load_tokenizer(source)
    assert "\n" not in str(refusal.value)


class Trap:
    """Creates a file when unpickled."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self):
        return os.mkdir, (str(self.sprung),)


def set_trap_in_pt(folder: Path, trap: bytes) -> None:
    (folder / "model.pt").write_bytes(trap)


def set_trap_in_jit(folder: Path, trap: bytes) -> None:
    with zipfile.ZipFile(folder / "autoencoder.jit", "w") as archive:
        archive.writestr("archive/constants.pkl", pickle.dumps(()))
        archive.writestr("archive/data.pkl", trap)


def set_trap_in_checkpoint(folder: Path, trap: bytes) -> None:
    (folder / ".metadata").write_bytes(trap)


@pytest.mark.parametrize("set_trap", [set_trap_in_pt, set_trap_in_jit, set_trap_in_checkpoint])
def test_no_pickle_runs_code(tmp_path, set_trap):
    sprung = tmp_path / "sprung"
    set_trap(tmp_path, pickle.dumps(Trap(sprung), protocol=2))
    with pytest.raises(ConfigError, match="can't be read as weights"):
        load_tokenizer(tmp_path)
    assert not sprung.exists()


def test_program_of_a_jit_file_is_not_needed(small, weights_in):
    source = weights_in("autoencoder.jit", "CV8x8x8")
    without_program(source / "autoencoder.jit")
    assert equal(load_tokenizer(source), small("CV8x8x8"))


def test_jit_file_of_something_else_is_refused(tmp_path):
    save_trace(torch.nn.Linear(2, 2), torch.zeros(1, 2), tmp_path / "autoencoder.jit")
    with pytest.raises(ConfigError, match="lacks tensors by which a Cosmos video tokenizer is known"):
        load_tokenizer(tmp_path)


def test_checkpoint_that_lost_a_file_is_refused(small, tmp_path):
    write_checkpoint(small("CV8x8x8"), tmp_path)
    next(tmp_path.glob("*.distcp")).unlink()
    with pytest.raises(ConfigError, match="can't be read as weights"):
        load_tokenizer(tmp_path)
