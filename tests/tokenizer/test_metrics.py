"""Metrics, against hand arithmetic, torchmetrics and the formula."""

import math

import pytest
import torch
from golden_vectors import load
from torchmetrics.functional.image import peak_signal_noise_ratio

from cosmos_hpc.tokenizer import psnr, ssim
from cosmos_hpc.tokenizer.metrics import border_error, code_use, flicker, psnr_inside, ssim_inside


def test_psnr_of_a_constant_error_is_worked_out_by_hand():
    clips = torch.zeros(2, 3, 5, 4, 6)
    reconstructions = clips.clone()
    reconstructions[0] += 0.2  # 0.1 of the full range
    reconstructions[1, :, 0] += 0.02  # one frame at 40 dB, the other four at the highest value
    assert psnr(clips, reconstructions).tolist() == pytest.approx([20.0, (40.0 + 4 * 100.0) / 5], abs=1e-4)


def test_psnr_agrees_with_torchmetrics():
    clips, reconstructions = torch.rand(2, 1, 3, 1, 16, 16) * 2 - 1
    expected = peak_signal_noise_ratio((reconstructions[:, :, 0] + 1) / 2, (clips[:, :, 0] + 1) / 2, data_range=1.0)
    assert psnr(clips, reconstructions).item() == pytest.approx(expected.item(), abs=1e-4)


def test_psnr_clamps_what_a_screen_can_not_show():
    clips = torch.ones(1, 3, 1, 8, 8)
    assert psnr(clips, clips + 3).item() == 100
    assert psnr(clips, clips * -7).item() == pytest.approx(0, abs=1e-5)
    assert math.isfinite(psnr(clips.bfloat16(), -clips.bfloat16()).item())


def test_ssim_of_flat_frames_is_the_formulas_first_factor():
    clips, reconstructions = torch.full((2, 3, 2, 16, 16), 0.2), torch.full((2, 3, 2, 16, 16), 0.2)
    reconstructions[1, :, 0] = 0.6  # 0.6 and 0.8 of the range: (2 x 0.6 x 0.8 + C1) / (0.6^2 + 0.8^2 + C1)
    off = (2 * 0.6 * 0.8 + 1e-4) / (1 + 1e-4)
    assert ssim(clips, reconstructions).tolist() == pytest.approx([1.0, (off + 1) / 2], abs=1e-4)


def test_ssim_is_of_floats_in_any_batch():
    clips, reconstructions = torch.rand(2, 2, 3, 2, 24, 24) * 2 - 1
    together = ssim(clips, reconstructions)
    alone = torch.cat([ssim(clips[i : i + 1], reconstructions[i : i + 1]) for i in range(2)])
    assert together.tolist() == pytest.approx(alone.tolist(), abs=1e-6)
    assert ssim(clips, clips + 1e-4).min() > ssim(clips, clips + 1e-2).max()  # 8 bits would see neither


def test_code_use_is_as_recorded_and_counts_what_occurs():
    recorded = load("losses")
    counts = torch.bincount(torch.from_numpy(recorded["metric/code_idx"]).flatten(), minlength=64000)
    assert code_use(counts).perplexity == pytest.approx(float(recorded["metric/code_perplexity"]), rel=1e-4)
    assert code_use(torch.tensor([3, 0, 3, 0])) == (0.5, pytest.approx(2.0))


def test_clips_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="pass clips and what became of them"):
        psnr(torch.zeros(1, 3, 5, 8, 8), torch.zeros(1, 3, 1, 8, 8))


def test_psnr_inside_is_of_the_pixels_that_count_in_the_frames_that_have_any():
    clips = torch.zeros(2, 3, 3, 8, 8)
    reconstructions = clips + 2.0  # 0 dB where nobody looks
    inside = torch.zeros(2, 1, 3, 8, 8, dtype=torch.bool)
    inside[0, :, 0, 2:5, 2:5] = inside[0, :, 1, :, :4] = True
    reconstructions[0, :, 0, 2:5, 2:5] = 0.2  # a tenth of the range: 20 dB
    reconstructions[0, :, 1, :, :4] = 0.02  # 40 dB
    found = psnr_inside(clips, reconstructions, inside)
    assert found[0].item() == pytest.approx(30.0, abs=1e-4)
    assert math.isnan(found[1])


def test_ssim_inside_everything_is_ssim_and_inside_the_good_half_is_one():
    clips, reconstructions = torch.rand(2, 1, 3, 2, 32, 48) * 2 - 1
    everything = torch.ones(1, 1, 2, 32, 48, dtype=torch.bool)
    assert ssim_inside(clips, reconstructions, everything).item() == pytest.approx(
        ssim(clips, reconstructions).item(),
        abs=0.02,  # which leaves out pixels whose window reaches over the edge
    )
    reconstructions[..., :24] = clips[..., :24]
    left = everything.clone()
    left[..., 18:] = False  # the window reaches five pixels further
    assert ssim_inside(clips, reconstructions, left).item() == pytest.approx(1.0, abs=1e-6)


def test_flicker_sees_what_changes_from_frame_to_frame_alone():
    clips = torch.rand(2, 3, 3, 8, 8) - 0.5
    reconstructions = clips + 0.1  # off, but steadily
    reconstructions[1, :, 1] += 0.4  # 0.2 of the range, there and back
    assert flicker(clips, reconstructions).tolist() == pytest.approx([0.0, 0.2], abs=1e-6)
    assert math.isnan(flicker(clips[:, :, :1], reconstructions[:, :, :1])[0])


def test_border_error_is_how_much_worse_the_jump_between_windows_is():
    clips = torch.zeros(1, 3, 6, 4, 4)
    brightness = torch.tensor([0.0, 0.02, 0.04, 0.14, 0.16, 0.18])  # jumps of 0.02, and 0.1 between the windows
    reconstructions = clips + brightness.view(6, 1, 1)
    assert border_error(clips, reconstructions, 3).item() == pytest.approx(5.0, abs=1e-3)
    assert math.isnan(border_error(clips, reconstructions, 6))
