"""How far the distribution of reconstructions is from that of the clips, as a network of the user's sees both."""

from pathlib import Path

import torch
from torch import Tensor

from cosmos_hpc.config.errors import ConfigError

I3D_ARGUMENTS = {"rescale": False, "resize": True, "return_features": True}
"""What the TorchScript file of I3D that published video distances use has to be told; other networks are called with
the clips alone."""


class FeatureNetwork:
    """A TorchScript file that maps clips to features. Running it runs the code in it."""

    def __init__(self, path: Path, device: torch.device) -> None:
        """Read it.

        Raises:
            ConfigError: if the file is not there or no TorchScript.
        """
        self._path = path
        try:
            self._network = torch.jit.load(path, map_location=device).eval()
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(f"{path} is no feature network ({reason}): name a TorchScript file") from None
        names = {argument.name for argument in self._network.forward.schema.arguments}
        self._arguments = {name: value for name, value in I3D_ARGUMENTS.items() if name in names}

    @torch.no_grad()
    def features(self, clips: Tensor) -> Tensor:
        """What the network sees.

        Args:
            clips: [B, 3, T, H, W] in [-1, 1]; clamped.

        Returns:
            [B, D] float64 on the CPU; what the network returns beyond two dimensions is averaged.

        Raises:
            ConfigError: if the network does not take such clips.
        """
        try:
            found = self._network(clips.float().clamp(-1, 1), **self._arguments)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            shape = list(clips.shape)
            raise ConfigError(f"{self._path} does not take clips {shape} in [-1, 1] ({reason}): wrap it") from None
        if not isinstance(found, Tensor) or found.dim() < 2 or len(found) != len(clips):
            raise ConfigError(f"{self._path} returns no features [B, D]: wrap the network so that it does")
        return found.flatten(2).mean(2).double().cpu() if found.dim() > 2 else found.double().cpu()


def frechet_distance(ours: Tensor, theirs: Tensor) -> float:
    """Squared Frechet distance of two Gaussians that have the features' means and covariances.

    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017; for
    video Unterthiner et al., 2018. The trace of the covariances' root is the nuclear norm of the product of their
    factors, which also holds for fewer videos than features. Few videos make it too large: compare equal numbers only.

    Args:
        ours: [N, D].
        theirs: [M, D].

    Returns:
        A number from 0 on; nan for fewer than two of either.
    """
    if min(len(ours), len(theirs)) < 2:
        return float("nan")
    factors = [torch.linalg.qr(_centred(each), mode="r").R for each in (ours, theirs)]
    apart = (ours.mean(0) - theirs.mean(0)).square().sum()
    spread = sum(factor.square().sum() for factor in factors)
    overlap = torch.linalg.svdvals(factors[0] @ factors[1].T).sum()
    return max(0.0, float(apart + spread - 2 * overlap))


def _centred(features: Tensor) -> Tensor:
    """F with F^T F the covariance."""
    return (features - features.mean(0)) / (len(features) - 1) ** 0.5
