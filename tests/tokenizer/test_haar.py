"""The wavelet transform, against recorded values."""

import pytest
import torch
import torch.nn.functional as F
from golden_vectors import error, largest_difference, load

from cosmos_hpc.tokenizer.haar import GAIN_PER_LEVEL, HaarPatcher, HaarUnpatcher, analyse

RECORDED = load("unit_haar")
DTYPES = {"f32": (torch.float32, 2e-6), "f64": (torch.float64, 1e-14)}
ROUNDED_TAPS = torch.tensor([0.70703125, 0.70703125])


def with_taps(module, taps):
    module.load_state_dict({**module.state_dict(), "wavelets": taps})
    return module


@pytest.mark.parametrize("precision", ["f32", "f64"])
@pytest.mark.parametrize("patch_size", [2, 4])
@pytest.mark.parametrize("shape", ["1x3x9x16x24", "2x3x1x8x16"])
def test_patches_and_back_are_as_recorded(precision, patch_size, shape):
    dtype, tolerance = DTYPES[precision]
    clips = torch.from_numpy(RECORDED[f"haar/f32/ps{patch_size}/{shape}/in"]).to(dtype)
    patches = HaarPatcher(patch_size)(clips)
    assert error(patches, RECORDED[f"haar/{precision}/ps{patch_size}/{shape}/patched"]) < tolerance
    back = HaarUnpatcher(patch_size)(patches)
    assert error(back, RECORDED[f"haar/{precision}/ps{patch_size}/{shape}/roundtrip"]) < tolerance
    assert (back - clips).abs().max() < 2e-6  # the taps are 1/sqrt(2) in float32, at any precision


@pytest.mark.parametrize("precision", ["f32", "f64"])
@pytest.mark.parametrize("shape", ["1x192x3x4x6", "2x192x1x2x2"])
def test_any_patches_become_the_recorded_clips(precision, shape):
    dtype, tolerance = DTYPES[precision]
    patches = torch.from_numpy(RECORDED[f"unhaar/ps4/{shape}/in"]).to(dtype)
    assert error(HaarUnpatcher(4)(patches), RECORDED[f"unhaar/ps4/{shape}/{precision}"]) < tolerance


def test_bfloat16_is_rounded_as_in_the_release():
    clips = torch.from_numpy(RECORDED["haar/bf16/in"]).bfloat16()
    assert largest_difference(HaarPatcher(4).bfloat16().wavelets, RECORDED["haar/bf16/wavelets"]) == 0
    patches = with_taps(HaarPatcher(4), ROUNDED_TAPS)(clips)
    assert patches.dtype == torch.bfloat16
    assert error(patches, RECORDED["haar/bf16/patched"]) < 2**-7
    back = with_taps(HaarUnpatcher(4), ROUNDED_TAPS)(patches)
    assert back.dtype == torch.bfloat16
    assert error(back, RECORDED["haar/bf16/roundtrip"]) < 2**-7


def test_rounded_taps_of_a_checkpoint_are_used_in_float32():
    clips = torch.from_numpy(RECORDED["haar/bf16/in"])
    patches = with_taps(HaarPatcher(4), ROUNDED_TAPS)(clips)
    assert error(patches, RECORDED["haar/f32_with_bf16_wavelets/patched"]) < 2e-6
    back = with_taps(HaarUnpatcher(4), ROUNDED_TAPS)(patches)
    assert error(back, RECORDED["haar/f32_with_bf16_wavelets/roundtrip"]) < 2e-6
    assert (back / clips).median().item() == pytest.approx((2 * 0.70703125**2) ** 6, rel=1e-5)


def test_odd_sizes_are_those_of_a_reflected_clip():
    """No valid clip has odd sizes at any level; the transform of a level is checked on them all the same."""
    patches = torch.from_numpy(RECORDED["haar/odd/in"])
    patches = torch.cat([patches[:, :, :1]] * 3 + [patches], 2)
    for _ in range(2):
        padding = [amount for size in reversed(patches.shape[2:]) for amount in (0, size % 2)]
        patches = analyse(F.pad(patches, padding, mode="reflect")) * HaarPatcher(4).tap ** 3 / GAIN_PER_LEVEL
    assert error(patches, RECORDED["haar/odd/patched"]) < 2e-6


def test_constant_clip_gives_its_colour_in_three_channels():
    colour = torch.tensor([0.5, -0.25, 1.0]).view(1, 3, 1, 1, 1)
    patches = HaarPatcher(4)(colour.expand(1, 3, 9, 16, 8))
    assert torch.allclose(patches[:, :3], colour.expand(1, 3, 3, 4, 2), atol=1e-6)
    assert patches[:, 3:].abs().max() < 1e-6


def test_autocast_leaves_the_transform_in_float32():
    clips = torch.rand(1, 3, 5, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert HaarPatcher(4)(clips).equal(HaarPatcher(4)(clips.clone()))
        assert HaarUnpatcher(4)(HaarPatcher(4)(clips).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("patch_size", [2, 4])
def test_one_matrix_product_is_the_transform_and_its_way_back(patch_size):
    clips = torch.rand(2, 3, 9, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    patcher, unpatcher = HaarPatcher(patch_size), HaarUnpatcher(patch_size)
    patches = patcher(clips)
    with torch.autocast("cpu", torch.bfloat16):  # as in training
        torch.testing.assert_close(patcher(clips), patches, rtol=0, atol=1e-6)
        torch.testing.assert_close(unpatcher(patches), clips, rtol=0, atol=5e-6)
