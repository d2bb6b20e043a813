"""Frames are covered by tiles that share what was asked for, and put together again as they were."""

from itertools import pairwise

import pytest
import torch

from cosmos_hpc.tokenizer.tiles import Tile, blend_tiles, blending_weights, spans


def test_pieces_are_spread_evenly_over_an_axis():
    assert spans(10, length=6, overlap=2) == [slice(0, 6), slice(4, 10)]
    assert spans(11, length=6, overlap=2) == [slice(0, 6), slice(2, 8), slice(5, 11)]
    assert spans(5, length=6, overlap=2) == [slice(0, 5)]


@pytest.mark.parametrize(("length", "overlap"), [(6, 1), (6, 3), (6, 5), (2, 1)])
def test_neighbours_share_at_least_what_was_asked_for(length, overlap):
    for size in range(1, 40):
        pieces = spans(size, length, overlap)
        assert (pieces[0].start, pieces[-1].stop) == (0, size)
        shared = [one.stop - other.start for one, other in pairwise(pieces)]
        assert all(overlap <= cells < length for cells in shared)
        weights = blending_weights(pieces, overlap, scale=4)
        assert weights.sum(0).allclose(torch.ones(4 * size))
        for piece, share in zip(pieces, weights, strict=True):
            assert not share[: 4 * piece.start].any()
            assert not share[4 * piece.stop :].any()


def test_share_falls_in_a_straight_line_over_the_overlap():
    weights = blending_weights([slice(0, 3), slice(1, 4)], overlap=2, scale=1)
    assert weights.tolist() == [[1, 0.75, 0.25, 0], [0, 0.25, 0.75, 1]]


def cut(picture: torch.Tensor, tile: Tile) -> torch.Tensor:
    return picture[..., tile.rows.start * 8 : tile.rows.stop * 8, tile.columns.start * 8 : tile.columns.stop * 8]


@pytest.mark.parametrize("size", [(4, 5), (9, 20), (17, 3)], ids=str)
def test_tiles_of_a_picture_make_the_picture(size):
    picture = torch.rand(2, 3, size[0] * 8, size[1] * 8)
    blended = blend_tiles(*size, 6, 2, 8, lambda tile: cut(picture, tile))
    assert blended.allclose(picture, atol=1e-6)
