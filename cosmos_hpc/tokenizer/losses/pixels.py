"""How far apart pixels are."""

from torch import Tensor


def mean_absolute_difference(clips: Tensor, reconstructions: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of |clips - reconstructions| over what the mask counts, a scalar in float32 or better.

    In two stages: one over the picture, one over the rest. Compiled for a GPU, a single reduction of so many values
    takes five times as long.

    Args:
        clips: [B, 3, T, H, W].
        reconstructions: the same shape.
        mask: the same shape, each value's share of the mean; none: all count alike. Nothing counts: 0.

    Raises:
        ValueError: if the shapes differ, as the difference would silently broadcast.
    """
    check_same_shape(clips, reconstructions)
    differences = (clips - reconstructions).abs()
    if mask is None:
        return _mean(differences)
    check_same_shape(clips, mask, "a mask")
    return _mean(mask * differences) / _mean(mask).clamp(min=1e-12)


def absolute_difference_and_slope(
    clips: Tensor, reconstructions: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`mean_absolute_difference`, and its gradient at the reconstructions, [B, 3, T, H, W].

    Raises:
        ValueError: if the shapes differ.
    """
    value = mean_absolute_difference(clips, reconstructions, mask)
    signs = (reconstructions - clips).sign()
    if mask is None:
        return value, signs / clips.numel()
    return value, mask * signs / (_mean(mask).clamp(min=1e-12) * clips.numel())


def check_same_shape(clips: Tensor, other: Tensor, what: str = "reconstructions") -> None:
    """Refuse what would broadcast.

    Raises:
        ValueError: if the shapes differ.
    """
    if clips.shape != other.shape:
        raise ValueError(
            f"clips are {list(clips.shape)} but {what} {list(other.shape)}: pass clips and what became of them"
        )


def _mean(values: Tensor) -> Tensor:
    pictures = values.flatten(3).mean(3)
    return (pictures.float() if pictures.itemsize < 4 else pictures).mean()
