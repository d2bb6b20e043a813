"""Large frames in overlapping tiles, blended where they meet, so that the device holds one tile at a time."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """A rectangle of latent cells."""

    rows: slice
    columns: slice


def spans(size: int, length: int, overlap: int) -> list[slice]:
    """Cover one axis by the fewest pieces of one length, spread evenly, neighbours sharing `overlap` or more."""
    if size <= length:
        return [slice(0, size)]
    num_gaps = -(-(size - length) // (length - overlap))
    starts = [i * (size - length) // num_gaps for i in range(num_gaps + 1)]
    return [slice(start, start + length) for start in starts]


def blending_weights(pieces: Sequence[slice], overlap: int, scale: int) -> Tensor:
    """How much each piece of an axis counts at each position.

    A piece's share rises from its edge over `overlap`, where what lies beyond the edge is felt most.

    Args:
        pieces: from `spans`.
        overlap: least overlap of two pieces, in the same unit.
        scale: positions per unit.

    Returns:
        [pieces, positions], sum 1 at each position.
    """
    positions = (torch.arange(pieces[-1].stop * scale) + 0.5) / scale
    shares = []
    for piece in pieces:
        rise = (positions - piece.start) / overlap if piece.start > 0 else torch.ones_like(positions)
        fall = (piece.stop - positions) / overlap if piece.stop < pieces[-1].stop else torch.ones_like(positions)
        shares.append(torch.minimum(rise, fall).clamp(0, 1))
    weights = torch.stack(shares)
    return weights / weights.sum(0)


def blend_tiles(
    height: int, width: int, length: int, overlap: int, scale: int, compute: Callable[[Tile], Tensor]
) -> Tensor:
    """Compute a frame tile by tile.

    Args:
        height: of the frame in latent cells.
        width: the same.
        length: of a tile's sides in latent cells.
        overlap: latent cells that neighbours share at least, from 1 to `length` - 1.
        scale: positions of the result per latent cell.
        compute: a tile's part of the result, [..., rows x scale, columns x scale].

    Returns:
        [..., height x scale, width x scale], on the CPU and in float32 or better if there are several tiles.
    """
    rows, columns = spans(height, length, overlap), spans(width, length, overlap)
    if len(rows) == len(columns) == 1:
        return compute(Tile(rows[0], columns[0]))
    row_weights, column_weights = (blending_weights(pieces, overlap, scale) for pieces in (rows, columns))
    blended = torch.zeros(())
    for i, j in product(range(len(rows)), range(len(columns))):
        part = compute(Tile(rows[i], columns[j])).cpu()
        part = part.to(torch.promote_types(part.dtype, torch.float32))
        if i == j == 0:
            blended = part.new_zeros(*part.shape[:-2], height * scale, width * scale)
        y, x = (slice(piece.start * scale, piece.stop * scale) for piece in (rows[i], columns[j]))
        blended[..., y, x] += part * row_weights[i, y, None] * column_weights[j, x]
    return blended
