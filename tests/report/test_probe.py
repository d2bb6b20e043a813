from pathlib import Path

import numpy as np
import pytest

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.report.probe import Probe

DETECTOR = """\
import numpy as np

def classes(frames):
    return (frames.mean(axis=(1, 2, 3)) > 100).astype(int)

def nothing(frames):
    return None

def scores(frames):
    return frames.mean(axis=(1, 2, 3))

def fails(frames):
    raise RuntimeError("no weights")
"""


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "road_detector.py").write_text(DETECTOR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return lambda function: Probe(f"road_detector:{function}")


def test_arrays_agree_by_the_share_of_equal_values(probe) -> None:
    dark, light = np.zeros((4, 8, 8, 3), np.uint8), np.full((4, 8, 8, 3), 200, np.uint8)
    mixed = np.concatenate([dark[:1], light[:3]])
    found = probe("classes")
    assert found.look(mixed).tolist() == [0, 1, 1, 1]
    assert found.agreement(found.look(mixed), found.look(light)) == 0.75
    assert found.agreement(found.look(dark), found.look(light)) == 0.0


def test_detections_agree_where_label_frame_and_half_of_the_box_do(probe) -> None:
    agreement = probe("classes").agreement
    car, moved, far = ("car", 0, 0, 10, 10), ("car", 2, 0, 12, 10), ("car", 8, 0, 18, 10)
    assert agreement([[car]], [[moved]]) == 1.0  # 80 of 120
    assert agreement([[car]], [[far]]) == 0.0  # 20 of 180
    assert agreement([[car]], [[("truck", *car[1:])]]) == 0.0
    assert agreement([[car], []], [[], [car]]) == 0.0  # another frame
    assert agreement([[car, far]], [[moved]]) == pytest.approx(2 / 3)  # one of two found: F1 of 1 and 1/2
    assert agreement([[car]], [[moved, car]]) == pytest.approx(2 / 3)  # nobody counts twice
    assert np.isnan(agreement([[], []], [[], []]))


def test_probes_that_can_not_be_used_are_refused(probe) -> None:
    dark = np.zeros((4, 8, 8, 3), np.uint8)
    with pytest.raises(ConfigError, match="--probe is detect, but takes module:function"):
        Probe("detect")
    with pytest.raises(ConfigError, match=r"which can't be imported .*no_such_module"):
        Probe("no_such_module:detect")
    with pytest.raises(ConfigError, match=r"which can't be imported .*no_such_function"):
        probe("no_such_function")
    with pytest.raises(ConfigError, match="road_detector:fails failed: RuntimeError: no weights"):
        probe("fails").look(dark)
    for function in ("nothing", "scores"):
        found = probe(function)
        with pytest.raises(ConfigError, match="return an array of integers"):
            found.agreement(found.look(dark), found.look(dark))
