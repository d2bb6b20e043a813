"""What Weights & Biases is told: by the real package, offline; online, a double of its run stands for the server."""

import io
import logging
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.schema import RunConfig, WandbConfig
from cosmos_hpc.ranks import Rank
from cosmos_hpc.training.live_bar import LiveBar
from cosmos_hpc.training.telemetry import StepMetrics, Telemetry, ValidationScores
from cosmos_hpc.training.tracking import Tracker, _project, _run_id, start_tracking

KEY = "0123456789abcdef0123456789abcdef01234567"


def metrics(step: int, **changes: object) -> StepMetrics:
    return StepMetrics(step, 0.5 / step, 0.5 / step, 1e-3, 1.0, 0.2, 0.05, 40.0, 8 * step)._replace(**changes)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> RunFolder:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT_NAME", "WANDB_PROJECT", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # it reads the environment once
    path = tmp_path / "quick" / "000-abc"
    path.mkdir(parents=True)
    return RunFolder(path)


def telemetry(folder: RunFolder, attempt: int = 0, **wandb: object) -> Telemetry:
    return Telemetry(folder, RunConfig(wandb=WandbConfig(**wandb)), Rank(0, 0, 1), attempt)


def records(file: Path):
    """The protocol buffers of a .wandb file: LevelDB's log format, behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def offline_run(folder: RunFolder) -> list:
    (file,) = folder.path.glob("wandb/offline-run-*/*.wandb")
    return list(records(file))


def told_steps(folder: RunFolder) -> list[int]:
    return [record.history.step.num for record in offline_run(folder) if record.WhichOneof("record_type") == "history"]


def attempt_in_a_process(path: Path, attempt: int, length: int) -> None:
    """Two attempts of one run: the first is killed behind step 5, with a checkpoint of step 3."""
    folder = RunFolder(path)
    voice = telemetry(folder, attempt)
    voice.resume_at(3 * attempt, length)
    if attempt == 0:
        voice.log_start(ValidationScores(7.5))
        for step in range(1, 6):
            voice.log(metrics(step))
            if step == 3:
                print(voice.metrics_bytes, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    for step in range(4, 7):
        voice.log(metrics(step))
    voice.roll_back_to(3, length)
    for step in range(4, 8):
        voice.log(metrics(step))
    voice.close()


def test_without_a_key_a_run_is_kept_offline_and_each_step_is_told_once_across_requeues(folder):
    said = ["0"]
    for attempt in range(2):
        call = f"import test_tracking as t; t.attempt_in_a_process(t.Path({str(folder.path)!r}), {attempt}, {said[-1]})"
        command = [sys.executable, "-c", call]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        assert done.returncode == (0 if attempt else -signal.SIGKILL), done.stderr
        said = done.stdout.split() or said
    assert told_steps(folder) == [0, 1, 2, 3, 4, 5, 6, 7]
    (run,) = [record.run for record in offline_run(folder) if record.WhichOneof("record_type") == "run"]
    assert (run.run_id, run.project, run.display_name) == ("quick-000-abc", "cosmos-hpc", "quick/000-abc")
    assert len(list(folder.path.glob("wandb/replaced-offline-run-*"))) == 1, "nothing is thrown away"


def test_without_a_network_a_run_is_kept_offline(folder, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    voice = telemetry(folder)
    voice.resume_at(0, 0)
    voice.log(metrics(1))
    voice.close()
    assert "wandb can't be reached" in caplog.text
    assert told_steps(folder) == [1]
    assert not [file for file in folder.path.rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()]


class Server:
    """In the place of wandb.init and of the run that it gives, which knows the last step that the server has."""

    def __init__(self, last_step: int = -1) -> None:
        self.step = last_step + 1
        self.lines: list[dict] = []
        self.asked: dict = {}

    def init(self, **settings: object) -> "Server":
        self.asked = settings
        self.id = settings["id"]
        return self

    def log(self, line: dict, step: int) -> None:
        assert step == line["step"]
        self.lines.append(line)

    def finish(self) -> None:
        pass


@pytest.fixture
def server(monkeypatch) -> Server:
    import wandb

    own = Server()
    monkeypatch.setattr(wandb, "init", own.init)
    return own


def test_online_what_a_kill_kept_back_is_made_up_for_and_what_is_trained_again_is_left_out(folder, server, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    first = telemetry(folder)
    first.resume_at(0, 0)
    for step in range(1, 6):
        first.log(metrics(step))
        length = first.metrics_bytes
    first.close()
    assert (server.asked["mode"], server.asked["resume"]) == ("online", "allow")
    for last_on_server in (2, 5, 7):  # behind the checkpoint at 5, at it, ahead of it
        again = Server(last_on_server)
        monkeypatch.setattr("wandb.init", again.init)
        second = telemetry(folder, attempt=1)
        second.resume_at(5, length)
        for step in range(6, 9):
            second.log(metrics(step))
        assert [line["step"] for line in again.lines] == list(range(last_on_server + 1, 9))
        assert again.asked["id"] == server.asked["id"] == second.wandb_id
        second.close()


def test_the_guides_variables_name_project_and_run(folder, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT_NAME", "roads")
    assert _project(RunConfig()) == "roads"
    assert _project(RunConfig(wandb=WandbConfig(project="own"))) == "own"
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    assert _run_id(folder) == "chosen"
    monkeypatch.setenv("WANDB_RUN_ID", "other")
    assert _run_id(folder) == "chosen", "a requeued run gets another name"
    for name in ("001-def", "002-fed"):
        (folder.path.parent / name).mkdir()
        (folder.path.parent / name / "config.yaml").touch()
    assert _run_id(RunFolder(folder.path.parent / "002-fed")) == "other-002"


@pytest.mark.parametrize(
    ("setting", "variable", "key", "expected"),
    [
        ("auto", None, None, "offline"),
        ("auto", None, KEY, "online"),
        ("auto", "disabled", KEY, None),
        ("auto", "offline", KEY, "offline"),
        ("offline", None, KEY, "offline"),
        ("disabled", None, KEY, None),
    ],
)
def test_mode_follows_the_setting_then_the_environment_then_the_key(
    folder, server, monkeypatch, setting, variable, key, expected
):
    folder.metrics.write_text("")
    for name, value in (("WANDB_MODE", variable), ("MY_KEY", key)):
        if value is not None:
            monkeypatch.setenv(name, value)
    start_tracking(RunConfig(wandb=WandbConfig(mode=setting, api_key_env="MY_KEY")), folder)
    assert server.asked.get("mode") == expected


@pytest.mark.parametrize("log_media", [False, True])
def test_pictures_leave_only_where_they_may(folder, server, log_media):
    voice = telemetry(folder, mode="offline", log_media=log_media)
    voice.resume_at(0, 0)
    voice.show(np.zeros((4, 8, 3), dtype=np.uint8))
    voice.log(metrics(1, validation=ValidationScores(20.0)))
    voice.log(metrics(2))
    voice.close()
    assert ["reconstruction" in line for line in server.lines] == [log_media, False]
    assert WandbConfig().log_media is False


def test_pictures_are_of_clip_and_reconstruction_in_whole_colours():
    from cosmos_hpc.training.validation import _side_by_side

    clip = torch.stack([torch.full((3, 2, 2), value) for value in (-1.0, 0.0, 1.0)], dim=1)
    pictures = _side_by_side(clip, clip * 3)
    assert pictures.shape == (4, 4, 3)
    assert pictures[:, :, 0].tolist() == [[0] * 4] * 2 + [[255] * 4] * 2
    middle = torch.full((3, 1, 2, 2), 0.2)
    assert (_side_by_side(middle, middle) == 153).all()  # (0.2 + 1) / 2 of 255, where the guide's preview shows 0.7


def test_a_bar_shows_where_standard_error_is_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert LiveBar.on_terminal("x", 10) is None
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    logger = logging.getLogger("cosmos_hpc")
    handler = logging.StreamHandler(terminal)
    monkeypatch.setattr(logger, "handlers", [handler])
    bar = LiveBar.on_terminal("quick/000", 10)
    assert bar is not None
    bar.show(metrics(4, memory_gib=1.25))
    logger.warning("a line of the log")
    bar.close()
    assert handler.stream is terminal
    for words in ("quick/000", "4/10", "loss 0.1250, 40.00 clips/s, data wait 25%, 1.2 GiB", "a line of the log"):
        assert words in terminal.getvalue()


def test_a_tracker_without_earlier_steps_tells_step_0():
    run = SimpleNamespace(step=0, id="x", log=lambda line, step: told.append(step))
    told: list[int] = []
    tracker = Tracker(run)
    for step in (0, 1, 1, 0, 2):
        tracker.log({"step": step})
    assert told == [0, 1, 2]
