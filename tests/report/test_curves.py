import math
from xml.etree import ElementTree

import pytest
from report_parts import WriteRun, attempt, run_config, step_lines

from cosmos_hpc.report.curves import COLOURS, loss_curves, moving_mean, psnr_curves, run_style
from cosmos_hpc.report.run_data import read_run


def parsed(svg: str) -> ElementTree.Element:
    """The picture as a document of its own; `xlink:` needs its name space there."""
    return ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns:xlink="urn:xlink" ', 1))


def strokes(svg: str, colour: str) -> list[str]:
    """The drawn lines of one colour; shapes with an id are markers, defined to be used many times."""
    paths = [path for path in parsed(svg).iter("path") if "id" not in path.attrib]
    return [path.attrib["d"] for path in paths if f"stroke: {colour}" in path.get("style", "")]


def test_moving_mean_takes_equally_many_neighbours_on_both_sides() -> None:
    assert moving_mean([1.0, 3.0, 8.0, 4.0, 0.0], reach=1) == [1.0, 4.0, 5.0, 4.0, 0.0]


def test_one_line_a_run_and_a_mark_where_it_was_interrupted(write_run: WriteRun) -> None:
    lines = [*step_lines(1, 20, 0, val_psnr=12.0), *step_lines(21, 30, 1, val_psnr=13.0)]
    state = {"status": "running", "attempts": [attempt(0, 0, 1, "preempted", step=20), attempt(1, 2, None, None)]}
    records = [
        read_run(write_run(run_config("d", seed=0), lines, state)),
        read_run(write_run(run_config("d", seed=1), step_lines(1, 30, 0, val_psnr=11.0))),
    ]
    for svg, num_lines in ((loss_curves(records), 2), (psnr_curves(records), 1)):
        assert svg is not None
        assert len(strokes(svg, COLOURS[0])) == num_lines + 1
        assert len(strokes(svg, COLOURS[1])) == num_lines


def test_without_numbers_there_is_no_picture(write_run: WriteRun) -> None:
    record = read_run(write_run(run_config("d")))
    assert loss_curves([record]) is None
    assert psnr_curves([record]) is None


def test_diverged_run_leaves_a_gap_and_no_failure(write_run: WriteRun) -> None:
    lines = step_lines(1, 9, 0)
    lines[4]["loss"] = math.nan
    svg = loss_curves([read_run(write_run(run_config("d"), lines))])
    assert svg is not None
    assert "nan" not in strokes(svg, COLOURS[0])[0].lower()


def test_picture_names_no_address_and_follows_the_ink_of_the_page(write_run: WriteRun) -> None:
    svg = loss_curves([read_run(write_run(run_config("d"), step_lines(1, 9, 0)))])
    assert svg is not None
    assert "http" not in svg
    assert "currentColor" in svg
    assert "step" in [text.text for text in parsed(svg).iter("text")]


def test_thirty_thousand_steps_stay_a_light_picture(write_run: WriteRun) -> None:
    svg = loss_curves([read_run(write_run(run_config("d"), step_lines(1, 30_000, 0)))])
    assert svg is not None
    assert len(svg) < 100_000


@pytest.mark.parametrize("index", [12, 24])
def test_runs_beyond_the_colours_are_told_apart_by_their_dashes(index: int) -> None:
    assert run_style(index).colour == run_style(0).colour
    assert run_style(index).dash != run_style(0).dash
