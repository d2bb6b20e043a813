"""Videos to latents or indices on disk, for training that downstream models do on them; a killed call goes on."""

from cosmos_hpc.tokenize.statistics import measure, statistics_for
from cosmos_hpc.tokenize.work import Progress, TokenizeSummary, encode_frames, tokenize

__all__ = ["Progress", "TokenizeSummary", "encode_frames", "measure", "statistics_for", "tokenize"]
