"""Post-train NVIDIA Cosmos video tokenizers on your own video, on your own SLURM cluster."""

__version__ = "0.1.0"
