"""Finite scalar quantisation, against recorded values."""

import zlib

import numpy as np
import pytest
import torch
from golden_vectors import error, largest_difference, load

from cosmos_hpc.config.schema import ModelConfig
from cosmos_hpc.tokenizer import build_tokenizer
from cosmos_hpc.tokenizer.architecture import FSQ_LEVELS
from cosmos_hpc.tokenizer.quantizer import FiniteScalarQuantizer

RECORDED = load("unit_fsq")
PRECISIONS = {"": torch.float32, "bf16_": torch.bfloat16, "f64_": torch.float64}


@pytest.fixture
def quantizer() -> FiniteScalarQuantizer:
    return FiniteScalarQuantizer(FSQ_LEVELS)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_codes_and_indices_are_as_recorded(quantizer, precision):
    latents = torch.from_numpy(RECORDED["z"]).to(PRECISIONS[precision])
    codes = quantizer(latents)
    assert codes.dtype == latents.dtype
    assert largest_difference(codes, RECORDED[f"{precision}codes"]) < 1e-6
    assert (quantizer.codes_to_indices(codes).numpy() == RECORDED[f"{precision}indices"]).all()


def test_bound_is_as_recorded(quantizer):
    latents = torch.from_numpy(RECORDED["z"])
    assert error(quantizer.bound(latents).movedim(1, -1), RECORDED["bound"]) < 1e-6
    assert error(quantizer.bound(latents.double()).movedim(1, -1), RECORDED["f64_bound"]) < 1e-14


def test_gradient_passes_the_rounding(quantizer):
    latents = torch.from_numpy(RECORDED["z"]).requires_grad_()
    (quantizer(latents) * torch.from_numpy(RECORDED["gout"])).sum().backward()
    assert error(latents.grad, RECORDED["gin"]) < 2e-6


def test_equal_values_in_every_channel_cover_all_levels(quantizer):
    ramp = torch.from_numpy(RECORDED["ramp"]).view(-1, 6, 1, 1, 1)
    codes = quantizer(ramp)
    assert [len(codes[:, channel].unique()) for channel in range(6)] == list(FSQ_LEVELS)
    assert (quantizer.codes_to_indices(codes).flatten().numpy() == RECORDED["ramp_indices"]).all()
    assert error(quantizer.bound(ramp).flatten(), RECORDED["ramp_bound"].flatten()) < 1e-6
    assert error(codes.flatten(), RECORDED["ramp_quantize"].flatten()) < 1e-6


def test_indices_become_the_recorded_codes(quantizer):
    codes = quantizer.indices_to_codes(torch.from_numpy(RECORDED["idx_in"]))
    assert largest_difference(codes, RECORDED["idx_codes"]) == 0


def test_codebook_is_the_recorded_one_and_stays_bfloat16(quantizer):
    quantizer = quantizer.double()
    codebook = quantizer.implicit_codebook
    assert codebook.dtype == torch.bfloat16
    assert largest_difference(codebook[::97], RECORDED["codebook_stride97"]) == 0
    digits = (codebook.float() * 4).numpy().astype(np.int8)
    assert zlib.crc32(digits.tobytes()) == RECORDED["codebook_crc32_int8_x4"][0]


def test_every_index_survives_the_way_to_codes_and_back(quantizer):
    indices = torch.arange(64000).view(1, 1, 160, 400)
    assert quantizer.codes_to_indices(quantizer.indices_to_codes(indices)).equal(indices.int())


def test_other_levels_are_as_recorded():
    quantizer = FiniteScalarQuantizer(tuple(int(level) for level in RECORDED["other_levels"]))
    codes = quantizer(torch.from_numpy(RECORDED["other_z"]))
    assert largest_difference(codes, RECORDED["other_codes"]) < 1e-6
    assert (quantizer.codes_to_indices(codes).numpy() == RECORDED["other_indices"]).all()


def test_autocast_does_not_coarsen_the_rounding(quantizer):
    latents = torch.from_numpy(RECORDED["z"])
    with torch.autocast("cpu", torch.bfloat16):
        assert quantizer(latents).equal(quantizer(latents.clone()))
        assert (quantizer.codes_to_indices(quantizer(latents)).numpy() == RECORDED["indices"]).all()


def test_a_bfloat16_decoder_makes_the_same_of_indices_and_of_codes():
    tokenizer = build_tokenizer(ModelConfig(model="Cosmos-1.0-Tokenizer-DV8x16x16", channels=8)).to(torch.bfloat16)
    clips = (torch.rand(1, 3, 9, 32, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1).bfloat16()
    with torch.no_grad():
        from_codes = tokenizer.decode(tokenizer.encode(clips))
        from_indices = tokenizer.decode_indices(tokenizer.encode_indices(clips))
    assert from_indices.equal(from_codes)
