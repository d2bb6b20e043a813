"""Small videos for calls of the command."""

from pathlib import Path

import numpy as np

from cosmos_hpc.data.video_file import write_mp4


def write_films(folder: Path, count: int) -> None:
    for number in range(count):
        frames = (np.full((32, 32, 3), 20 * number + 5 * index, np.uint8) for index in range(12))
        write_mp4(folder / f"{number}.mp4", frames, fps=25)
