"""What the ranks do: the loop, Megatron-Core around it, checkpoints, stopping, and what is written down."""
