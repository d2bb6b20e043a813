"""What a run is: its settings, how they are read, how a sweep expands, and where a run lives on disk."""
