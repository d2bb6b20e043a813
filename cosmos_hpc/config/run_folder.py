"""Every path of an experiment and of a run, and the name that a run's settings give it."""

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos_hpc.config.schema import RunConfig, identity


def run_hash(run: RunConfig) -> str:
    """Eight hexadecimal digits over the settings that change the result; equal settings, equal digits."""
    text = json.dumps(identity(run), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def run_hashes(runs: Sequence[RunConfig]) -> list[str]:
    """The same for the runs of a sweep, each by what tells it from the others.

    Where some would have the same result, as in a sweep over nodes alone, what else they differ in names them as well.
    """
    found = [run_hash(run) for run in runs]
    for digits in [digits for digits, count in Counter(found).items() if count > 1]:
        twins = {index: _flat(dataclasses.asdict(runs[index])) for index, own in enumerate(found) if own == digits}
        varied = sorted(
            key for key in set().union(*twins.values()) if len({repr(t.get(key)) for t in twins.values()}) > 1
        )
        for index, settings in twins.items():
            text = json.dumps([digits, {key: repr(settings.get(key)) for key in varied}])
            found[index] = hashlib.sha256(text.encode()).hexdigest()[:8]
    return found


def _flat(settings: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Dotted setting to value."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return found


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file's content so that a reader, or a kill at any instant, sees the old or the new one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """The file's object; empty where there is no file yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


@dataclass(frozen=True)
class RunFolder:
    """runs/<experiment>/<index>-<hash>/ and everything in it. Makes no folder by itself."""

    path: Path

    @property
    def label(self) -> str:
        """<experiment>/<index>-<hash>, as the commands take it."""
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def experiment(self) -> "ExperimentFolder":
        """The experiment that the run belongs to."""
        return ExperimentFolder(self.path.parent)

    @property
    def config(self) -> Path:
        """Resolved settings, as YAML."""
        return self.path / "config.yaml"

    @property
    def script(self) -> Path:
        """`sbatch run.sh` starts the run, or goes on with it."""
        return self.path / "run.sh"

    @property
    def provenance(self) -> Path:
        """Code version and its diff, package versions, host."""
        return self.path / "provenance.json"

    @property
    def state(self) -> Path:
        """Attempts and how each ended; written by the supervisor alone."""
        return self.path / "state.json"

    @property
    def heartbeat(self) -> Path:
        """Step and phase of a living run; written by rank 0."""
        return self.path / "heartbeat.json"

    @property
    def metrics(self) -> Path:
        """One JSON line a step, each step once."""
        return self.path / "metrics.jsonl"

    @property
    def wandb_id(self) -> Path:
        """Name of the run at Weights & Biases, beside what its package keeps."""
        return self.path / "wandb" / "run_id"

    @property
    def quarantine(self) -> Path:
        """One JSON line a video that can't be used: shard, key, fault and reason."""
        return self.path / "quarantine.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Holds one folder a checkpoint."""
        return self.path / "checkpoints"

    @property
    def compiled(self) -> Path:
        """What torch.compile has made of the network, for later starts."""
        return self.path / "compiled"

    @property
    def exports(self) -> Path:
        """Where `export` writes unless told otherwise."""
        return self.path / "exports"

    @property
    def supervisor_lock(self) -> Path:
        """Locked while a supervisor of this run lives on this machine."""
        return self.path / "supervisor.lock"

    @property
    def save_request(self) -> Path:
        """Its presence asks the ranks for a checkpoint; taken away once that is begun."""
        return self.path / "checkpoint_now"

    @property
    def requeue_request(self) -> Path:
        """Its presence asks the ranks to save and leave, and the run to start again; taken away at the next start."""
        return self.path / "requeue_now"

    @property
    def cancel_mark(self) -> Path:
        """Its presence tells the supervisor that a person, not the scheduler, ended the job."""
        return self.path / "cancelled"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint written after `step` optimizer steps."""
        return self.checkpoints / f"step_{step:08d}"

    @property
    def pending_mark(self) -> Path:
        """Left by `submit` with the job's id, taken away by the supervisor that starts."""
        return self.path / "pending"

    def next_attempt(self) -> int:
        """Number of the next start of the ranks, whoever starts them."""
        return 1 + max((int(folder.name) for folder in self.path.glob("logs/[0-9]*")), default=-1)

    def newest_checkpoint(self) -> Path | None:
        """The whole checkpoint of the latest step; none before the first save."""
        return max(self.checkpoints.glob("step_????????"), default=None)

    def newest_step(self) -> int:
        """Step of the newest checkpoint; 0 before the first save."""
        newest = self.newest_checkpoint()
        return 0 if newest is None else int(newest.name.partition("_")[2])

    def unfinished_checkpoints(self) -> list[Path]:
        """What a kill or a full disk left of a save."""
        return sorted(self.checkpoints.glob("step_????????.partial*"))

    def checkpoint_layout(self, checkpoint: Path) -> Path:
        """Step, ranks and format of a checkpoint, as JSON."""
        return checkpoint / "checkpoint.json"

    def attempt_logs(self, attempt: int) -> Path:
        """Logs of the attempt-th start of the step, counted from 0."""
        return self.path / "logs" / f"{attempt:03d}"

    def rank_log(self, attempt: int, rank: int) -> Path:
        """Everything that one rank printed in one attempt."""
        return self.attempt_logs(attempt) / f"rank_{rank}.log"

    def cut_metrics(self, attempt: int) -> Path:
        """Lines that an attempt cut off metrics.jsonl, since it trained their steps again."""
        return self.attempt_logs(attempt) / "metrics_cut.jsonl"

    def launcher_log(self, attempt: int) -> Path:
        """What the process that starts the ranks printed: deaths before a rank could open its own log."""
        return self.attempt_logs(attempt) / "launcher.log"

    def outcome(self, attempt: int) -> Path:
        """How the attempt ended, as rank 0 saw it; missing where it could not tell."""
        return self.attempt_logs(attempt) / "outcome.json"

    def failure(self, attempt: int, rank: int) -> Path:
        """The exception that a rank ended by, as it saw it; missing where it ended otherwise."""
        return self.attempt_logs(attempt) / f"failure_rank_{rank}.json"

    def failures(self, attempt: int) -> list[Path]:
        """What ranks left of this kind in one attempt."""
        return sorted(self.attempt_logs(attempt).glob("failure_rank_*.json"))

    def rank_logs(self, attempt: int) -> list[Path]:
        """Logs of the ranks that came so far as to open one."""
        return sorted(self.attempt_logs(attempt).glob("rank_*.log"))


@dataclass(frozen=True)
class ExperimentFolder:
    """runs/<experiment>/: the runs of one experiment file."""

    path: Path

    @property
    def name(self) -> str:
        """Experiment name."""
        return self.path.name

    @property
    def submissions(self) -> Path:
        """One JSON line a submission: which run went to which job."""
        return self.path / "submissions.jsonl"

    @property
    def submitit(self) -> Path:
        """Logs of the supervisors, and submitit's pickles of local ones."""
        return self.path / "submitit"

    @property
    def scripts(self) -> Path:
        """What sbatch was given."""
        return self.path / "scripts"

    @property
    def code(self) -> Path:
        """Snapshots of the code that jobs run."""
        return self.path / "code"

    @property
    def doctor(self) -> Path:
        """Holds a folder for each probe job; those in which all was well are removed."""
        return self.path / "doctor"

    @property
    def submit_lock(self) -> Path:
        """Locked while a submission is at work."""
        return self.path / "submit.lock"

    @property
    def max_parallel(self) -> Path:
        """How many runs may share this machine, as the newest submission said."""
        return self.path / "max_parallel"

    @property
    def report(self) -> Path:
        """The HTML page."""
        return self.path / "report" / "index.html"

    @property
    def evaluations(self) -> Path:
        """Holds a folder for each set of videos that the runs were evaluated on."""
        return self.path / "report" / "evaluations"

    def slot_lock(self, slot: int) -> Path:
        """Locked by the supervisor that holds one of `max_parallel` places on this machine."""
        return self.path / "slots" / f"{slot}.lock"

    def runs(self) -> list[RunFolder]:
        """The runs that have a folder, in the order of their index."""
        return [RunFolder(config.parent) for config in sorted(self.path.glob("*-*/config.yaml"))]

    def place(self, runs: list[RunConfig]) -> list[RunFolder]:
        """A folder for each run: the one it has already, else the next free index."""
        existing = {folder.path.name.partition("-")[2]: folder for folder in self.runs()}
        free = 1 + max((int(folder.path.name.partition("-")[0]) for folder in existing.values()), default=-1)
        placed = []
        for digits in run_hashes(runs):
            if digits not in existing:
                existing[digits] = RunFolder(self.path / f"{free:03d}-{digits}")
                free += 1
            placed.append(existing[digits])
        return placed


def runs_folder() -> Path:
    """Where experiments lie: the environment variable COSMOS_HPC_RUNS, else runs/ in the working folder."""
    return Path(os.environ.get("COSMOS_HPC_RUNS", "runs")).resolve()
