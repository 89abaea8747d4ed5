"""The files of a run: its folder, its checkpoints, who writes to it, and how it ended."""
