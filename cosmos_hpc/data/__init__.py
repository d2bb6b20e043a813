"""From a folder of videos to batches of clips: packing, indexing, decoding, and a loader that resumes exactly.

Kept empty: `dataset_index` is read on login nodes, where nothing may import torch.
"""
