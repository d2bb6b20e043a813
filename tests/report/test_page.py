import base64
import io
import json
import math
import re
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread, imsave
from report_parts import WriteRun, attempt, evaluation_set, grey_state, run_config, save_checkpoint, step_lines

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.run_folder import ExperimentFolder
from cosmos_hpc.report.page import write_report, written_duration, written_value
from cosmos_hpc.report.pictures import spread_positions
from cosmos_hpc.report.scores import Evaluation, LatentDrift, write_evaluation

VOID = {"meta", "img", "br", "wbr", "link", "input", "hr"}


@dataclass
class Element:
    """A tag with what is inside it."""

    tag: str
    attributes: dict[str, str]
    children: list["Element | str"] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All words inside, with single spaces."""
        words = (child if isinstance(child, str) else child.text for child in self.children)
        return " ".join(" ".join(words).split())

    def all(self, tag: str) -> list["Element"]:
        """The tags of that name inside, in order."""
        inside = [child for child in self.children if isinstance(child, Element)]
        return [found for child in inside for found in ([child] if child.tag == tag else []) + child.all(tag)]

    def by_id(self, name: str) -> "Element":
        """The element with an id."""
        found = self.find_id(name)
        assert found is not None, f"no element #{name}"
        return found

    def find_id(self, name: str) -> "Element | None":
        """The element with an id, if there is one."""
        inside = [child for child in self.children if isinstance(child, Element)]
        matches = (child if child.attributes.get("id") == name else child.find_id(name) for child in inside)
        return next((match for match in matches if match is not None), None)


class Tree(HTMLParser):
    """Builds elements; complains of tags that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Element("root", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def read_page(path: Path) -> Element:
    tree = Tree()
    tree.feed(path.read_text())
    assert tree.open == [tree.root]
    return tree.root


def table(page: Element, name: str) -> list[dict[str, str]]:
    """The rows of a table by their column's heading."""
    head, *rows = page.by_id(name).all("tr")
    titles = [cell.text.replace(". ", ".") for cell in head.all("th")]
    return [dict(zip(titles, (cell.text for cell in row.all("th") + row.all("td")), strict=True)) for row in rows]


def pixels(image: Element) -> np.ndarray:
    """[H, W, 3] in 0 .. 255, decoded from the page itself."""
    head, _, data = image.attributes["src"].partition(",")
    assert head == "data:image/png;base64"
    return np.round(imread(io.BytesIO(base64.b64decode(data)), format="png")[..., :3] * 255.0)


def finished(**more: Any) -> dict[str, Any]:
    return {"status": "finished", "attempts": [attempt(0, 1000.0, 1075.0, "finished", step=40, **more)]}


def test_table_holds_the_numbers_of_the_metrics_file(experiment: ExperimentFolder, write_run: WriteRun) -> None:
    start = {"step": 0, "val_psnr": 10.25, "attempt": 0}
    write_run(
        run_config("gone", lr=1e-4), [start, *step_lines(1, 39, 0), *step_lines(40, 40, 0, val_psnr=12.0)], finished()
    )
    interrupted = [*step_lines(1, 20, 0), *step_lines(21, 39, 1), *step_lines(40, 40, 1, val_psnr=13.5)]
    two_attempts = [
        attempt(0, 1000.0, 1060.0, "preempted", step=20),
        attempt(1, 5000.0, 5045.0, "finished", step=40),
    ]
    write_run(run_config("gone", lr=3e-4), [start, *interrupted], {"status": "finished", "attempts": two_attempts})
    page = read_page(write_report(experiment))
    last_ten = sum(1 / step for step in range(31, 41)) / 10
    first, second = table(page, "runs")
    assert first == {
        "run": experiment.runs()[0].path.name,
        "optim.lr": "0.0001",
        "status": "finished",
        "step": "40 / 40",
        "final loss (mean of last 10 steps)": f"{last_ten:.4f}",
        "val PSNR at start, dB": "10.25",
        "val PSNR at end, dB": "12.00",
        "gain, dB": "+1.75",
    }
    assert table(page, "costs")[0] == {
        "run": experiment.runs()[0].path.name,
        "clips/s (median)": "3.00",  # half of the steps at 2, half at 4
        "wall time": "1 min 15 s",
        "GPU-hours": "0.0208",  # one rank
        "GPU-hours per dB": "0.0119",  # over 1.75
        "attempts": "0: finished at step 40",
    }
    assert second["run"].endswith(" best")
    assert second["gain, dB"] == "+3.25"
    cost = table(page, "costs")[1]
    assert cost["wall time"] == "1 min 45 s"
    assert cost["attempts"] == "0: preempted at step 20 1: finished at step 40"


def test_summary_names_the_best_run_its_gain_and_the_number_of_clips(
    dataset: Path, experiment: ExperimentFolder, write_run: WriteRun
) -> None:
    for seed, end in ((0, 14.5), (1, 15.25), (2, 13.0)):
        lines = [{"step": 0, "val_psnr": 11.0, "attempt": 0}, *step_lines(1, 1, 0, val_psnr=end)]
        write_run(run_config(dataset, seed=seed), lines, finished())
    best = experiment.runs()[1].path.name
    assert read_page(write_report(experiment)).by_id("summary").text == (
        f"Best run {best} (trainer.seed 1): 15.25 dB validation PSNR at step 1, "
        "4.25 dB above its starting weights (11.00 dB), over 4 validation clips."
    )


def test_summary_says_when_training_made_it_worse(experiment: ExperimentFolder, write_run: WriteRun) -> None:
    lines = [{"step": 0, "val_psnr": 30.0, "attempt": 0}, *step_lines(1, 1, 0, val_psnr=28.5)]
    write_run(run_config("gone"), lines, finished())
    page = read_page(write_report(experiment))
    assert "28.50 dB validation PSNR at step 1, 1.50 dB below its starting weights" in page.by_id("summary").text
    assert table(page, "runs")[0]["gain, dB"] == "\N{MINUS SIGN}1.50"


def test_pictures_show_the_clip_before_and_after_and_how_far_off(
    dataset: Path, experiment: ExperimentFolder, write_run: WriteRun
) -> None:
    config = run_config(dataset)
    folder = write_run(config, step_lines(1, 1, 0, val_psnr=12.0), finished())
    save_checkpoint(folder, grey_state(config), step=1)
    section = read_page(write_report(experiment, num_pictures=2)).by_id("pictures")
    assert [title.text for title in section.all("h3")] == [
        "Validation clip 2 of 4, frame 5 of 9",
        "Validation clip 4 of 4, frame 5 of 9",
    ]
    figures = section.all("figure")
    assert len(figures) == 2 * 5
    original, before, after, _, error = (pixels(figure.all("img")[0]) for figure in figures[:5])
    assert original.shape == before.shape == after.shape == error.shape == (32, 32, 3)
    assert np.all(after == 128)  # 127.5, rounded to even
    assert np.abs(error - np.minimum(255, 4 * np.abs(original - 127.5))).max() <= 0.5
    by_hand = 10 * math.log10(255**2 / np.mean((original - 127.5) ** 2))
    assert f"{folder.path.name} {by_hand:.2f} dB, clip " in figures[2].text
    assert "starting weights" in figures[1].text


def test_runs_from_the_same_weights_share_one_picture_of_them(
    dataset: Path, experiment: ExperimentFolder, write_run: WriteRun
) -> None:
    for lr, seed in ((1e-4, 0), (3e-4, 0), (1e-4, 1)):
        config = run_config(dataset, lr=lr, seed=seed)
        save_checkpoint(write_run(config, step_lines(1, 1, 0), finished()), grey_state(config), step=1)
    captions = [b.text for b in read_page(write_report(experiment, num_pictures=1)).by_id("pictures").all("b")]
    first, second, third = (folder.path.name for folder in experiment.runs())
    assert captions == [
        "original",
        f"starting weights ({first}, {second})",
        f"starting weights ({third})",
        first,
        second,
        third,
        f"error x 4, starting weights ({third})",
        f"error x 4, {third}",
    ]


def test_runs_on_other_clips_have_rows_of_their_own(
    dataset: Path, experiment: ExperimentFolder, write_run: WriteRun
) -> None:
    for crop_size in (16, 32):
        config = run_config(dataset, crop_size=crop_size)
        save_checkpoint(write_run(config, step_lines(1, 1, 0), finished()), grey_state(config), step=1)
    section = read_page(write_report(experiment, num_pictures=1)).by_id("pictures")
    titles = [title.text for title in section.all("h3")]
    assert titles == [f"Validation clip 3 of 4, frame 5 of 9 ({folder.path.name})" for folder in experiment.runs()]
    assert {pixels(image).shape[0] for image in section.all("img")} == {16, 32}


def test_page_of_runs_in_every_state_says_so(dataset: Path, experiment: ExperimentFolder, write_run: WriteRun) -> None:
    failed = [attempt(0, 0.0, 9.0, "failed", step=3, message="rank 1 on node-7: out of memory\nsee rank_1.log")]
    trained = run_config(dataset, seed=0)
    folder = write_run(trained, step_lines(1, 5, 0), {"status": "running", "attempts": [attempt(0, 0.0, None, None)]})
    save_checkpoint(folder, grey_state(trained), step=5)
    write_run(run_config(dataset, seed=1), step_lines(1, 3, 0), {"status": "failed", "attempts": failed})
    write_run(run_config(dataset, seed=2))
    page = read_page(write_report(experiment, num_pictures=1))
    assert page.by_id("summary").text == "No run has been validated after training yet."
    assert [row["status"] for row in table(page, "runs")] == ["running", "failed", "not started"]
    assert [row["attempts"] for row in table(page, "costs")] == ["0: running", "0: code fault at step 3", "none yet"]
    assert "attempt 0 failed: rank 1 on node-7: out of memory see rank_1.log" in page.text
    assert page.by_id("pictures").text.count("no checkpoint yet") == 2


def test_experiment_that_has_not_started_has_a_page(experiment: ExperimentFolder, write_run: WriteRun) -> None:
    write_run(run_config("gone"))
    page = read_page(write_report(experiment))
    assert "No run has made a step yet." in page.text
    assert "No pictures: no run has a checkpoint yet." in page.text
    assert table(page, "runs")[0]["final loss (mean of last 10 steps)"] == "\N{EN DASH}"


def test_page_without_the_dataset_tells_why_it_has_no_pictures(
    tmp_path: Path, experiment: ExperimentFolder, write_run: WriteRun
) -> None:
    config = run_config(tmp_path / "gone")
    save_checkpoint(write_run(config, step_lines(1, 1, 0), finished()), grey_state(config), step=1)
    page = read_page(write_report(experiment))
    assert f"No pictures: data.path is {tmp_path / 'gone'}, which is not there" in page.by_id("pictures").text


def test_damaged_checkpoint_takes_the_place_of_its_own_pictures_only(
    dataset: Path, experiment: ExperimentFolder, write_run: WriteRun
) -> None:
    for seed in (0, 1):
        config = run_config(dataset, seed=seed)
        tensors = grey_state(config)
        if seed == 1:
            del tensors["encoder.conv_out.1.conv3d.bias"]
        save_checkpoint(write_run(config, step_lines(1, 1, 0), finished()), tensors, step=1)
    section = read_page(write_report(experiment, num_pictures=1)).by_id("pictures")
    assert "lacks encoder.conv_out.1.conv3d.bias" in section.text
    assert len(section.all("img")) == 6  # original, two starts, one run, two errors


def test_without_pictures_asked_for_there_is_no_such_section(experiment: ExperimentFolder, write_run: WriteRun) -> None:
    write_run(run_config("gone"))
    assert read_page(write_report(experiment, num_pictures=0)).find_id("pictures") is None


def test_everything_that_users_wrote_is_escaped(experiment: ExperimentFolder, write_run: WriteRun) -> None:
    hostile = "<script>alert('é')</script>"
    config = run_config(f"/data/{hostile}", lr=1e-4)
    message = f"rank 0: {hostile}"
    write_run(
        config,
        step_lines(1, 1, 0, val_psnr=9.0),
        {"status": "failed", "attempts": [attempt(0, 0, 1, "failed", message=message)]},
    )
    other = replace(config, optim=replace(config.optim, lr=3e-4), data=replace(config.data, path="$x_{<b>}$"))
    write_run(other, step_lines(1, 1, 0, val_psnr=9.5), finished())
    renamed = ExperimentFolder(experiment.path.rename(experiment.path.with_name("<b>trial&")))
    page = read_page(write_report(renamed))
    [script] = page.all("script")
    assert "alert" not in script.text
    assert page.all("h1")[0].text == "<b>trial&"
    assert table(page, "runs")[0]["data.path"] == f"/data/{hostile}"
    assert f"data.path /data/{hostile}" in page.by_id("legend").text
    assert f"attempt 0 failed: {message}" in page.text
    assert "$x_{<b>}$" in page.by_id("setting-plots").text  # below its axis, as it is


def test_page_is_one_file_that_refers_to_nothing_else(
    dataset: Path, experiment: ExperimentFolder, write_run: WriteRun
) -> None:
    config = run_config(dataset)
    save_checkpoint(write_run(config, step_lines(1, 5, 0, val_psnr=9.0), finished()), grey_state(config), step=5)
    written = write_report(experiment, num_pictures=1)
    text = written.read_text()
    page = read_page(written)
    assert list(written.parent.iterdir()) == [written] == [experiment.report]
    assert re.search(r"https?://|@import|url\((?!#)", text) is None
    assert [page.all(tag) for tag in ("link", "iframe", "object")] == [[], [], []]
    assert [script.attributes for script in page.all("script")] == [{}]
    assert all(image.attributes["src"].startswith("data:") for image in page.all("img"))
    assert len(page.all("svg")) == 2
    assert text.isascii()


def test_all_settings_are_listed_once_where_shared_and_by_run_where_not(
    experiment: ExperimentFolder, write_run: WriteRun
) -> None:
    write_run(run_config("gone", lr=1e-4))
    write_run(run_config("gone", lr=3e-4))
    rows = {row.all("th")[0].text: [cell.text for cell in row.all("td")] for row in settings_rows(experiment)}
    assert rows["optim.lr"] == ["0.0001", "0.0003"]
    assert rows["optim.betas"] == ["0.5, 0.999"]
    assert rows["model.jit_ckpt_pth"] == ["none"]
    assert rows["loss.l1.weight"] == ["1"]


def settings_rows(experiment: ExperimentFolder) -> list[Element]:
    return read_page(write_report(experiment)).by_id("settings").all("tr")[1:]


def test_new_report_takes_the_place_of_the_old_one(experiment: ExperimentFolder, write_run: WriteRun) -> None:
    write_run(run_config("gone", seed=0))
    write_report(experiment)
    write_run(run_config("gone", seed=1))
    assert len(table(read_page(write_report(experiment)), "runs")) == 2


def test_experiment_without_runs_is_refused(experiment: ExperimentFolder) -> None:
    with pytest.raises(ConfigError, match="holds no run: submit the experiment first, or check the name"):
        write_report(experiment)


@pytest.mark.parametrize(
    ("seconds", "written"), [(38.4, "38 s"), (245, "4 min 05 s"), (7500, "2 h 05 min"), (59.7, "1 min 00 s")]
)
def test_durations_are_written_in_the_units_that_matter(seconds: float, written: str) -> None:
    assert written_duration(seconds) == written


@pytest.mark.parametrize(
    ("value", "written"),
    [(None, "none"), (3e-5, "3e-05"), (True, "true"), ((), "none"), ({"A": 1, "B": "x"}, "A=1, B=x"), ("bf16", "bf16")],
)
def test_values_are_written_as_a_person_would(value: object, written: str) -> None:
    assert written_value(value) == written


@pytest.mark.parametrize(
    ("num_clips", "num_pictures", "positions"), [(8, 3, [1, 4, 6]), (100, 2, [25, 75]), (2, 3, [0, 1]), (1, 3, [0])]
)
def test_pictures_are_spread_over_the_split(num_clips: int, num_pictures: int, positions: list[int]) -> None:
    assert spread_positions(num_clips, num_pictures) == positions


def test_goodput_tells_where_the_time_of_all_attempts_went(experiment: ExperimentFolder, write_run: WriteRun) -> None:
    first = {"allocated_s": 100.0, "productive_s": 40.0, "startup_s": 10.0, "lost_s": 50.0, "queue_s": 3600.0}
    second = {"allocated_s": 300.0, "productive_s": 260.0, "data_s": 20.0, "backoff_s": 20.0}
    attempts = [
        {**attempt(0, 0.0, 100.0, "hang", step=9), "goodput": first},
        {**attempt(1, 120.0, 400.0, "finished", step=40), "goodput": second},
    ]
    write_run(run_config("gone"), [], {"status": "finished", "attempts": attempts})
    page = read_page(write_report(experiment))
    (row,) = table(page, "goodput")
    assert (row["goodput"], row["allocated"]) == ("75.0%", "6 min 40 s")  # 300 of 400 s
    assert (row["steps that count"], row["lost steps"], row["queue"]) == ("5 min 00 s", "50 s", "1 h 00 min")
    assert row["validation"] == "\N{EN DASH}"
    widths = [span.attributes["style"] for span in page.by_id("goodput").all("div")[0].all("span")]
    assert widths == [f"width: {share}%" for share in (75.0, 2.5, 5.0, 0.0, 0.0, 12.5, 5.0, 0.0)]


def test_runs_of_earlier_versions_have_no_goodput(experiment: ExperimentFolder, write_run: WriteRun) -> None:
    write_run(run_config("gone"), [], finished())
    assert read_page(write_report(experiment)).find_id("goodput") is None


def two_runs(dataset: Path | str, write_run: WriteRun, **ends: float) -> list[str]:
    """Names of two runs of a sweep over the rate; the second one ends better."""
    names = []
    for lr, better in ((1e-4, 0.0), (3e-4, 1.0)):
        start = {"step": 0, "attempt": 0, "val_psnr": 10.0, "general_psnr": 12.0}
        scores = {"val_psnr": 12.0 + better, "general_psnr": 11.5 - better, "val_psnr_ema": 11.0, "val_ssim": 0.5}
        lines = [start, *step_lines(1, 39, 0), *step_lines(40, 40, 0, **scores, **ends)]
        names.append(write_run(run_config(dataset, lr=lr), lines, finished()).path.name)
    return names


def test_second_validation_set_has_its_curve_its_column_and_its_clause(
    experiment: ExperimentFolder, write_run: WriteRun
) -> None:
    two_runs("gone", write_run)
    page = read_page(write_report(experiment))
    assert page.by_id("general-curves").all("svg")
    first, second = table(page, "runs")
    minus = "\N{MINUS SIGN}"
    assert [row["gain on the general set, dB"] for row in (first, second)] == [f"{minus}0.50", f"{minus}1.50"]
    assert (second["of average, dB"], second["val SSIM"]) == ("11.00", "0.5000")
    assert "1.50 dB below them on the general set." in page.by_id("summary").text
    assert "cosmos-hpc evaluate trial" in page.by_id("hint").text


def test_varied_settings_are_drawn_against_what_they_brought(experiment: ExperimentFolder, write_run: WriteRun) -> None:
    two_runs("gone", write_run)
    [plot] = read_page(write_report(experiment)).by_id("setting-plots").all("figure")
    assert plot.text.endswith("optim.lr against validation PSNR at the end; a dot for each run.")
    dots = [use for use in plot.all("use") if "fill: #2f7ed8" in use.attributes["style"]]
    assert len(dots) == 1  # the first run's, in its colour


def moved(shift: float) -> LatentDrift:
    return LatentDrift(is_unchanged=False, mean_shift=(0.0, shift), std_ratio=(1.0, 1.25))


def lay_evaluations(experiment: ExperimentFolder, run: str, dataset: Path, **after: Any) -> None:
    """The runs' own videos, on which the run is 2 dB better, and others, on which it is 1 dB worse."""
    for data, gain in ((dataset, 2.0), (Path("/data/panda"), -1.0)):
        before = [20.0, 22.0, 24.0, 26.0]
        trained = {
            "psnr": [value + gain + (-1) ** index / 10 for index, value in enumerate(before)],
            **after["per_video"],
        }
        found = evaluation_set(
            Evaluation("start", {"psnr": before}, is_start=True, step=0),
            Evaluation("trained", trained, run, 40, latents=after["latents"]),
            data=str(data),
            slices={"night": ["true", "false", "true", "false"]},
        )
        write_evaluation(found, experiment.evaluations / data.name)


def test_verdict_tells_the_gain_the_forgetting_and_that_latents_no_longer_fit(
    dataset: Path, experiment: ExperimentFolder, write_run: WriteRun
) -> None:
    _, second = two_runs(dataset, write_run)
    crossed = {"old_encoder": [19.0] * 4, "old_decoder": [15.0] * 4, "changed": [0.25] * 4}
    lay_evaluations(experiment, second, dataset, per_video=crossed, latents=moved(-0.5))
    page = read_page(write_report(experiment))
    plus_minus = "\N{PLUS-MINUS SIGN}"
    assert page.by_id("summary").text == (
        f"Run {second} is better by 2.00 {plus_minus} 0.10 dB PSNR on your videos (4 videos), "
        f"worse by 1.00 {plus_minus} 0.10 dB PSNR on panda (4 videos), and its latents no longer fit what was made for "
        "those of its start: decoded crosswise they lose 8.00 dB, and 25.0% of the indices changed."  # 23 - 15
    )
    assert page.by_id("validation").text.startswith("In training: Best run")
    own, _ = (section for section in page.all("section") if section.attributes.get("class") == "evaluation")
    assert own.all("h2")[0].text == f"Evaluation on {dataset.name} (your videos)"
    assert "\N{MINUS SIGN}0.500, \N{MULTIPLICATION SIGN} 1.250" in own.text.replace("-", "\N{MINUS SIGN}")
    assert "night = true (2)" in own.text
    assert "trained : video 0 (22.10 dB)" in own.text


@pytest.mark.parametrize(
    ("latents", "words"),
    [
        (LatentDrift(True, (0.0,), (1.0,)), "and its latents are those of its start to the last bit."),
        (
            moved(0.01),
            "and its latents still fit what was made for those of its start: decoded crosswise they lose 0.25 dB.",
        ),
    ],
)
def test_verdict_tells_when_latents_still_fit(
    latents: LatentDrift, words: str, dataset: Path, experiment: ExperimentFolder, write_run: WriteRun
) -> None:
    _, second = two_runs(dataset, write_run)
    crossed = {"old_encoder": [23.5] * 4, "old_decoder": [22.75] * 4}  # of 23 on its own
    lay_evaluations(experiment, second, dataset, per_video=crossed, latents=latents)
    assert read_page(write_report(experiment)).by_id("summary").text.endswith(words)


def test_gain_that_may_be_none_is_not_called_better(
    dataset: Path, experiment: ExperimentFolder, write_run: WriteRun
) -> None:
    _, second = two_runs(dataset, write_run)
    found = evaluation_set(
        Evaluation("start", {"psnr": [20.0, 22.0, 24.0, 26.0]}),
        Evaluation("trained", {"psnr": [22.0, 20.0, 26.4, 24.0]}, second, 40),
        data=str(dataset),
    )
    write_evaluation(found, experiment.evaluations / "own")
    text = read_page(write_report(experiment)).by_id("summary").text
    assert text.startswith(f"Run {second} is neither better nor worse (+0.10 \N{PLUS-MINUS SIGN} ")


def test_frames_of_videos_are_on_the_page_only_with_pictures(
    dataset: Path, experiment: ExperimentFolder, write_run: WriteRun
) -> None:
    _, second = two_runs(dataset, write_run)
    lay_evaluations(experiment, second, dataset, per_video={}, latents=None)
    strips = experiment.evaluations / dataset.name / "strips"
    strips.mkdir()
    imsave(strips / "01-drive.png", np.zeros((4, 4, 3)))
    assert [image.attributes["alt"] for image in read_page(write_report(experiment)).all("img")] == ["01-drive"]
    assert read_page(write_report(experiment, num_pictures=0)).all("img") == []


def test_evaluation_of_another_version_is_told_and_left_out(experiment: ExperimentFolder, write_run: WriteRun) -> None:
    two_runs("gone", write_run)
    (experiment.evaluations / "old").mkdir(parents=True)
    (experiment.evaluations / "old" / "evaluation.json").write_text("[]")
    assert "no evaluation of this version" in read_page(write_report(experiment)).text


def test_quarantine_and_provenance_are_told(experiment: ExperimentFolder, write_run: WriteRun) -> None:
    folder = write_run(run_config("gone"), step_lines(1, 1, 0), finished())
    faults = ["undecodable"] * 23 + ["hanging"]
    lines = [{"shard": "shard-0.tar", "key": f"v{n}", "fault": each, "reason": "<b>"} for n, each in enumerate(faults)]
    folder.quarantine.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"shard": "torn')
    provenance = {"cosmos_hpc": "0.1", "git_commit": "abc123", "git_diff": "-a\n+b", "packages": {"torch": "2.13"}}
    newest = {**provenance, "command": ["cosmos-hpc", "submit"], "host": "login-1", "image": "sha256:77"}
    folder.provenance.write_text(json.dumps([{"time": "2026-11-01", "git_commit": "def456"}, newest]))
    page = read_page(write_report(experiment))
    quarantine = page.by_id("quarantine")
    assert quarantine.all("h3")[0].text == f"{folder.path.name}: 24 videos (23 undecodable, 1 hanging)"
    assert len(quarantine.all("tr")) == 1 + 20
    origin = page.by_id("provenance").text
    assert "0.1, commit abc123, 2 lines of uncommitted changes" in origin
    assert "torch 2.13" in origin
    assert "login-1" in origin
    assert 'image "sha256:77"' in origin
    assert f"{folder.path.name} earlier 2026-11-01, commit def456" in origin
