"""How runs come to a real queue: arrays, limits, dependencies, and submissions that are killed, refused or repeated."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from runs import cosmos_hpc, outcomes, steps, story, submit, wait_for_end, wait_for_step
from slurm_cluster import SlurmCluster, wait_until

import cosmos_hpc as package
from cosmos_hpc import api
from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.run_folder import ExperimentFolder, runs_folder
from cosmos_hpc.launch.status import run_status
from cosmos_hpc.launch.tasks import send_tasks

pytestmark = pytest.mark.slurm

STAND_IN = Path(__file__).parent / "stand_in"
REPOSITORY = Path(package.__file__).parents[1]
CLUSTER = f"""{{executor: slurm, partition: low, time_limit_min: 30,
  environment: {{PYTHONPATH: {STAND_IN}, STAND_IN_STEP_S: "0.05"}}}}"""


@pytest.fixture
def job(quick_job: Path) -> Path:
    """A job of two ranks on one node that count 20 steps in a second."""
    text = quick_job.read_text().replace("cluster: local", f"cluster: {CLUSTER}")
    quick_job.write_text(text.replace("max_steps: 24", "max_steps: 20"))
    return quick_job


@pytest.fixture
def full(slurm_cluster: SlurmCluster, tmp_path: Path) -> str:
    """A job that keeps all nodes for itself, so that whatever is submitted waits; its id."""
    job = slurm_cluster.sbatch(
        "sleep 600", "--partition=high", "--nodes=4", "--exclusive", output=tmp_path / "full.out"
    )
    slurm_cluster.wait_for_state(job, "RUNNING")
    return job


def sweep(job: Path, text: str) -> None:
    written = job.read_text().partition("sweep:")[0]
    job.write_text(f"{written}sweep: {text}\n")


def told(cluster: SlurmCluster, job: str, field: str) -> str:
    """A field of what the controller says of a job or array."""
    found = re.search(rf"\b{field}=(\S*)", cluster.call("scontrol", "show", "job", "--oneliner", job))
    return found[1] if found else ""


def arrays(jobs: dict[str, str]) -> list[str]:
    return list(dict.fromkeys(job.partition("_")[0] for job in jobs.values()))


def test_runs_that_ask_for_the_same_make_an_array_and_arrays_share_the_places(slurm_cluster, full, job):
    sweep(job, "{grid: {trainer.num_nodes: [1, 2], trainer.seed: [0, 1, 2]}, max_parallel: 3}")
    sent = api.submit(job, ["data.micro_batch_size=1"])
    one, two = arrays(sent.jobs)
    assert [told(slurm_cluster, array, "NumNodes").partition("-")[0] for array in (one, two)] == ["1", "2"]
    assert [told(slurm_cluster, array, "ArrayTaskThrottle") for array in (one, two)] == ["2", "1"]
    assert list(sent.jobs.values()) == [f"{array}_{index}" for array in (one, two) for index in range(3)]
    again = api.submit(job, ["data.micro_batch_size=1"])
    assert (again.jobs, {run.action for run in again.placed}) == ({}, {"skip: pending"})


def test_a_sweep_is_extended_behind_its_first_array_and_pruned(slurm_cluster, full, job):
    sweep(job, "{grid: {trainer.seed: [0, 1, 2]}, max_parallel: 2}")
    first = api.submit(job)
    sweep(job, "{grid: {trainer.seed: [1, 2, 3, 4]}, max_parallel: 2}")
    assert [folder.label for folder in api.plan(job).left] == list(first.jobs)[:1]
    (old,), more = arrays(first.jobs), api.submit(job, prunes=True)
    (new,) = arrays(more.jobs)
    assert len(more.jobs) == 2
    assert told(slurm_cluster, new, "Dependency") == f"afterany:{old}_*(unfulfilled)"
    assert list(more.pruned.values()) == ["will not start"]
    slurm_cluster.call("scancel", full)
    for element in (f"{old}_1", f"{old}_2", f"{new}_0", f"{new}_1"):
        slurm_cluster.wait_for_state(element, "COMPLETED", limit_s=240)

    def times() -> list[list[str]]:
        asked = ["--allocations", "--noheader", "--parsable2", f"--jobs={old},{new}"]
        rows = slurm_cluster.call("sacct", *asked, "--format=JobID,State,Start,End").splitlines()
        return [row.split("|") for row in rows if "COMPLETED" in row]

    wait_until(lambda: len(times()) == 4, "the accounting", 30, times)
    old_ends = [end for name, _, _, end in times() if name.startswith(old)]
    assert all(start >= max(old_ends) for name, _, start, _ in times() if name.startswith(new))
    assert [row.status for row in api.status("quick")] == ["cancelled", *["finished"] * 4]


def test_a_thousand_runs_are_cut_at_the_largest_array_and_told(slurm_cluster, full, job):
    sweep(job, "{random: {count: 1003, settings: {trainer.seed: {integers: [0, 1000000]}}}, max_parallel: 1}")
    marks = [time.monotonic()]
    planned = cosmos_hpc("plan", job, "--json")
    marks.append(time.monotonic())
    cosmos_hpc("submit", job)
    marks.append(time.monotonic())
    rows = json.loads(cosmos_hpc("status", "quick", "--json"))
    marks.append(time.monotonic())
    plan_s, submit_s, status_s = (end - start for start, end in itertools.pairwise(marks))
    print(f"1003 runs: plan {plan_s:.1f} s, submit {submit_s:.1f} s, status {status_s:.1f} s")
    assert (len(json.loads(planned)), len(rows), {row["status"] for row in rows}) == (1003, 1003, {"pending"})
    lines = [json.loads(line) for line in ExperimentFolder(runs_folder() / "quick").submissions.open()]
    jobs = lines[-1]["jobs"]
    first, second = arrays(jobs)
    assert list(jobs.values())[1000:] == [f"{first}_1000", f"{second}_0", f"{second}_1"]
    assert told(slurm_cluster, second, "Dependency") == f"afterany:{first}_*(unfulfilled)", "one place, two arrays"
    slurm_cluster.call("scancel", first, second)


def test_a_submission_killed_before_it_wrote_down_the_job_is_taken_over(
    slurm_cluster, full, job, tmp_path, monkeypatch
):
    sweep(job, "{grid: {trainer.seed: [0, 1]}}")
    double_of_sbatch(tmp_path, monkeypatch, 'answer=$("$real" "$@"); kill -KILL $PPID')
    assert killed_submit(job) == -9
    assert len(slurm_cluster.call("squeue", "--noheader", "--array", "--name=quick").splitlines()) == 2
    assert [row.status for row in api.status("quick")] == ["pending", "pending"]
    assert api.submit(job).jobs == {}, "they are in the queue already"
    slurm_cluster.call("scancel", full)
    wait_until(lambda: all(row.status == "finished" for row in api.status("quick")), "the runs", 240,
               lambda: api.status("quick"))  # fmt: skip


def test_a_submission_killed_before_sbatch_was_called_is_made_up_for(slurm_cluster, full, job, tmp_path, monkeypatch):
    double_of_sbatch(tmp_path, monkeypatch, "kill -KILL $PPID")
    assert killed_submit(job) == -9
    monkeypatch.undo()
    monkeypatch.chdir(job.parent)
    for name, value in slurm_cluster.environment.items():
        monkeypatch.setenv(name, value)
    (row,) = api.status("quick")
    assert (row.status, row.is_over) == ("unsupervised", True)
    assert len(api.submit(job).jobs) == 1


def double_of_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Puts a command in front of the real sbatch that does something else, except for its --test-only."""
    real = shutil.which("sbatch", path=os.environ["PATH"])
    double = tmp_path / "bin" / "sbatch"
    double.parent.mkdir()
    double.write_text(f'#!/bin/bash\nreal={real}\ncase "$*" in *--test-only*) exec $real "$@";; esac\n{script}\n')
    double.chmod(0o755)
    monkeypatch.setenv("PATH", f"{double.parent}:{os.environ['PATH']}")


def killed_submit(job: Path) -> int:
    command = [sys.executable, "-m", "cosmos_hpc.cli", "submit", str(job)]
    return subprocess.run(command, capture_output=True, check=False).returncode


def test_what_sbatch_refuses_takes_back_what_it_took_before(slurm_cluster, full, job, tmp_path, monkeypatch):
    sweep(job, "{zip: {trainer.num_nodes: [1, 2], trainer.seed: [0, 1]}}")
    words = "Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size)"
    mark = tmp_path / "once"
    refuses = f'if [ -e {mark} ]; then echo "sbatch: error: {words}" >&2; exit 1; fi; touch {mark}; exec $real "$@"'
    double_of_sbatch(tmp_path, monkeypatch, refuses)
    with pytest.raises(ConfigError, match=r"user's size\): send fewer runs, or wait.*nothing was sent"):
        api.submit(job, ["data.micro_batch_size=1"])
    wait_until(lambda: not slurm_cluster.call("squeue", "--noheader", "--name=quick"), "an empty queue", 30)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["cluster.partition=gold"], "cluster.partition is gold, .*: set low or high or short"),
        (["cluster.partition=short", "cluster.time_limit_min=31"], "is 31, but partition short allows 30: set that or"),
        (["cluster.gpus_per_node=9"], "asks for 9 GPUs a node, but nodes of partition low"),
        (["trainer.num_nodes=5", "trainer.devices=1", "data.global_batch_size=10"], "is 5, but partition low has 4"),
        (["cluster.cpus_per_task=3"], "is 6, but nodes of partition low have 4 CPUs"),
        (["cluster.constraint=h100"], "Invalid feature specification: set cluster.constraint"),
        (["cluster.reservation=mine"], "reservation is invalid: set cluster.reservation"),
        (["cluster.exclude=nowhere"], "Invalid node name specified: set cluster.exclude"),
        (["cluster.directives={gros: 1}"], "unrecognized option '--gros=1': see cluster.directives"),
        (["after=pack_roads"], "after: pack_roads is no experiment in .* and no job: submit it first"),
    ],
)  # fmt: skip
def test_what_can_never_start_is_refused_before_anything_is_sent(slurm_cluster, job, overrides, words):
    before = slurm_cluster.queue()
    with pytest.raises(ConfigError, match=words):
        api.submit(job, ["data.num_workers=0", *overrides])
    assert slurm_cluster.queue() == before


def test_a_run_waits_for_the_job_that_makes_its_data_and_for_another_experiment(slurm_cluster, full, job, tmp_path):
    pack = slurm_cluster.sbatch("exit 0", "--job-name=pack_roads", output=tmp_path / "pack.out")
    missing = f"data.path={tmp_path}/not/there/yet"
    (first,) = api.submit(job, ["name=first", "after=pack_roads", missing]).jobs.values()
    assert told(slurm_cluster, first, "Dependency") == f"afterok:{pack}(unfulfilled)"
    (second,) = api.submit(job, ["name=second", "after=[first, pack_roads]"]).jobs.values()
    assert told(slurm_cluster, second, "Dependency") == f"afterok:{first}(unfulfilled),afterok:{pack}(unfulfilled)"
    slurm_cluster.call("scancel", full)
    for name in (first, second):
        slurm_cluster.wait_for_state(name, "COMPLETED", limit_s=240)
    (third,) = api.submit(job, ["name=third", "after=[first, pack_roads]"]).jobs.values()
    assert told(slurm_cluster, third, "Dependency") == "(null)", "both are done"


def test_a_task_on_data_that_is_warned_of_its_time_limit_goes_back_to_the_queue_once(slurm_cluster, tmp_path):
    """The warning comes as before a time limit: to all processes of the job's steps."""
    script = f"echo started >> {tmp_path}/starts; trap : USR2; until [ -e {tmp_path}/go ]; do sleep 0.2; done"
    task = partial(subprocess.run, ["bash", "-c", script], check=True)
    profile = tmp_path / "cpu.yaml"
    profile.write_text("{executor: slurm, partition: low, time_limit_min: 30, gpus_per_node: 0, cpus_per_task: 2}")
    (job,) = send_tasks("task", [task], tmp_path / "submitit", str(profile))
    starts = tmp_path / "starts"
    wait_until(starts.exists, "the task", 60, slurm_cluster.queue)
    time.sleep(1)  # until submitit listens
    slurm_cluster.call("scancel", "--signal=USR2", job)
    wait_until(lambda: starts.read_text().count("started") == 2, "its second start", 60, slurm_cluster.queue)
    (tmp_path / "go").touch()
    slurm_cluster.wait_for_state(job, "COMPLETED")
    assert slurm_cluster.job(job).restarts == 1


def test_what_waits_for_a_run_that_fails_does_not_stay_in_the_queue(slurm_cluster, full, job, tmp_path):
    slurm_cluster.sbatch("exit 1", "--job-name=pack_roads", output=tmp_path / "pack.out")
    (waiting,) = api.submit(job, ["after=pack_roads"]).jobs.values()
    slurm_cluster.call("scancel", full)
    slurm_cluster.wait_for_state(waiting, "CANCELLED")
    with pytest.raises(ConfigError, match=r"after: pack_roads: job \d+ is FAILED: run it again"):
        api.submit(job, ["after=pack_roads"])


def checkout(tmp_path: Path) -> Path:
    """A copy of the code that a test may edit."""
    copy = tmp_path / "checkout"
    for name in ("cosmos_hpc", "jobs", "slurm", "enroot"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def test_a_waiting_job_runs_the_code_as_it_was_and_not_as_it_was_edited(slurm_cluster, full, job, tmp_path):
    mine = checkout(tmp_path)
    commit = "git init -q . && git add . && git -c user.name=me -c user.email=me@here commit -qm all"
    subprocess.run(commit, shell=True, cwd=mine, check=True)
    main = mine / "cosmos_hpc" / "job" / "__main__.py"
    main.write_text('print("new and not committed", flush=True)\n' + main.read_text())
    (mine / "jobs" / "mine.yaml").write_text("name: mine\n")
    command = [sys.executable, "-m", "cosmos_hpc.cli", "submit", str(job)]
    environment = {**os.environ, "PYTHONPATH": str(mine), "COSMOS_HPC_RUNS": str(runs_folder())}
    subprocess.run(command, env=environment, cwd=mine, check=True)
    main.write_text('raise SystemExit("edited while the job was waiting")\n')
    (mine / "cosmos_hpc" / "job" / "supervisor.py").unlink()
    slurm_cluster.call("scancel", full)
    (folder,) = ExperimentFolder(runs_folder() / "quick").runs()
    wait_for_end(slurm_cluster, folder, "COMPLETED", "FAILED")
    assert outcomes(folder) == ["finished"], story(slurm_cluster, folder)
    (log,) = folder.experiment.submitit.glob("*.out")
    assert "new and not committed" in log.read_text()
    start = json.loads(folder.provenance.read_text())[-1]
    assert '+print("new and not committed", flush=True)' in start["git_diff"].splitlines()
    code = Path(start["code"])
    assert (code.parent, (code / "jobs" / "mine.yaml").read_text()) == (folder.experiment.code, "name: mine\n")


def test_a_run_folder_starts_itself_and_is_not_sent_twice(slurm_cluster, job, full):
    planned = cosmos_hpc("plan", job, "--script")
    (folder,) = submit(job, "quick")
    assert planned == folder.script.read_text()
    assert "will not start" in cosmos_hpc("cancel", "quick")
    wait_for_end(slurm_cluster, folder, "CANCELLED")
    by_hand = slurm_cluster.call("sbatch", "--parsable", str(folder.script))
    assert (run_status(folder).status, folder.pending_mark.read_text()) == ("pending", by_hand)
    assert api.submit(job).jobs == {}
    slurm_cluster.call("scancel", full)
    slurm_cluster.wait_for_state(by_hand, "COMPLETED", "FAILED", limit_s=240)
    assert run_status(folder).status == "finished", story(slurm_cluster, folder)


def test_plain_sbatch_has_the_same_supervisor_and_run_folder_and_goes_on_with_the_code_it_began_with(
    slurm_cluster, job, tmp_path
):
    sweep(job, "{grid: {trainer.seed: [0, 1]}}")
    mine = checkout(tmp_path)
    environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(mine)}
    sized = ["env", *(f"{name}={value}" for name, value in environment.items()), "sbatch", "--parsable",
             "--partition=low", "--ntasks-per-node=1", "--gpus-per-node=1", "--time=20", "--array=0-1",
             str(mine / "slurm" / "posttrain.sbatch"), str(job), "trainer.max_steps=100"]  # fmt: skip
    array = slurm_cluster.call(*sized)
    wait_until(lambda: len(ExperimentFolder(runs_folder() / "quick").runs()) == 2, "two run folders", 120,
               lambda: [log.read_text() for log in Path().glob("posttrain*")])  # fmt: skip
    folders = ExperimentFolder(runs_folder() / "quick").runs()
    for folder in folders:
        wait_for_step(slurm_cluster, folder, 3)
    (mine / "cosmos_hpc" / "posttrain.py").write_text('raise SystemExit("edited while the job was waiting")\n')
    written = job.read_text()
    job.write_text("name: edited\n")
    slurm_cluster.call("scancel", "--signal=USR2", f"{array}_1")
    for index in range(2):
        slurm_cluster.wait_for_state(f"{array}_{index}", "COMPLETED", "FAILED", limit_s=240)
    assert [outcomes(folder) for folder in folders] == [["finished"], ["time_limit", "finished"]]
    assert [steps(folder)[-1] for folder in folders] == [100, 100]
    codes = {Path(json.loads(folder.provenance.read_text())[-1]["code"]) for folder in folders}
    assert {code.parent for code in codes} == {folders[0].experiment.code}
    assert all("cosmos_hpc.job " in folder.script.read_text() for folder in folders)
    assert not list((runs_folder() / ".posttrain").iterdir())
    job.write_text(written)
    assert api.plan(job, ["trainer.max_steps=100"]).placed[0].action == "skip: finished"
