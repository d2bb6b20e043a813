"""PSNR, against hand arithmetic and torchmetrics."""

import math

import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio

from cosmos_hpc.tokenizer import psnr


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


def test_clips_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="pass clips and what became of them"):
        psnr(torch.zeros(1, 3, 5, 8, 8), torch.zeros(1, 3, 1, 8, 8))
