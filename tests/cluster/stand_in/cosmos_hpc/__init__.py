"""Stands in front of the real package on the ranks' path where only the scheduler's behaviour is tested."""
