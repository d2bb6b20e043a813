"""From settings to processes: SLURM options, the container prefix, submission, status. Never imports torch."""
