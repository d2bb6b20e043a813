"""Networks for readers that have no taps but their own.

Released weights hold the taps of the wavelet filters rounded to bfloat16, by which a transform's gain is 0.07 % smaller
a level. Files without a place for taps (cosmos-predict1's model.pt, diffusers) are read by networks that make their
own, so the convolutions that read and make patches take the difference over.
"""

import torch
from torch import Tensor

from cosmos_hpc.tokenizer.continuous import ContinuousTokenizer
from cosmos_hpc.tokenizer.discrete import DiscreteTokenizer
from cosmos_hpc.tokenizer.haar import TAP


def own_tap(dtype: torch.dtype) -> float:
    """The tap of a network that was built afresh and cast."""
    return torch.tensor(TAP).to(dtype).item()


def parameters_for_own_taps(network: ContinuousTokenizer | DiscreteTokenizer) -> dict[str, Tensor]:
    """The parameters, scaled beside the wavelet transforms for a network of the same dtype with its own taps."""
    parameters = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    tap = own_tap(network.post_quant_conv.conv3d.weight.dtype)
    for filters, names in (
        (network.encoder.patcher3d, ("encoder.conv_in.0.conv3d.weight",)),
        (network.decoder.unpatcher3d, ("decoder.conv_out.1.conv3d.weight", "decoder.conv_out.1.conv3d.bias")),
    ):
        gain = (filters.tap / tap) ** (3 * filters.num_levels)
        for name in names:
            parameters[name] *= gain
    return parameters
