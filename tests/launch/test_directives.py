"""What SLURM is told, read from the text that submitit would hand to sbatch and from the srun line."""

import re
import subprocess
from pathlib import Path

import pytest
from submitit.slurm.slurm import _make_sbatch_string

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import load_experiment, resolve
from cosmos_hpc.config.run_folder import ExperimentFolder, RunFolder
from cosmos_hpc.launch.directives import directives
from cosmos_hpc.launch.placement import PlacedRun
from cosmos_hpc.launch.step import step_command, step_environment
from cosmos_hpc.launch.submit import planned_batches

ROOT = Path(__file__).parents[2]
SIZE = ["data.path=/data/roads", "trainer.num_nodes=2", "trainer.devices=8", "data.global_batch_size=64"]


def run(*overrides: str):
    return resolve(load_experiment(None, ["cluster.executor=slurm", *SIZE, *overrides]), {})


def sbatch_lines(options: dict) -> list[str]:
    """The #SBATCH lines, made by submitit's own writer from its own names."""
    slurm = {name.removeprefix("slurm_"): value for name, value in options.items()}
    slurm["job_name"], slurm["time"] = slurm.pop("name"), slurm.pop("timeout_min")
    slurm["ntasks_per_node"] = slurm.pop("tasks_per_node")
    return [line for line in _make_sbatch_string("true", "folder", **slurm).splitlines() if line.startswith("#SBATCH")]


def array_line(options: dict) -> str:
    return next(line for line in sbatch_lines({**options, "map_count": 600}) if "--array" in line)


def test_each_size_is_written_once_and_is_the_jobs_real_one():
    options = directives(run())
    options.pop("nodes"), options.pop("slurm_setup")
    assert options["slurm_additional_parameters"] == {
        "requeue": True, "nodes": 2, "ntasks_per_node": 8, "gpus_per_node": 8,
    }  # fmt: skip
    assert all("-" not in name for name in options["slurm_additional_parameters"])


def test_profile_fields_become_sbatch_lines():
    profile = {"partition": "fast", "account": "team", "qos": "long", "constraint": "h100", "reservation": "mine",
               "exclude": "'node[3,7]'", "time_limit_min": 90, "grace_s": 120, "gpus_per_node": 4, "cpus_per_task": 12,
               "directives": "{exclusive: true, mem: 0}"}  # fmt: skip
    settings = [f"cluster.{name}={value}" for name, value in profile.items()]
    lines = [line.replace("'", "") for line in sbatch_lines(directives(run(*settings), max_parallel=2))]
    for expected in ("--partition=fast", "--account=team", "--qos=long", "--constraint=h100", "--reservation=mine",
                     "--exclude=node[3,7]", "--time=90", "--signal=USR2@120", "--gpus-per-node=4",
                     "--cpus-per-task=12", "--exclusive", "--mem=0"):  # fmt: skip
        assert f"#SBATCH {expected}" in lines
    assert "#SBATCH --requeue" in lines


@pytest.mark.parametrize("name", ["h100", "a100"])
def test_all_that_a_shipped_profile_offers_can_be_used(tmp_path, name):
    first, *rest = (ROOT / "slurm" / f"{name}.yaml").read_text().splitlines()
    offered = re.compile(r"^( *)# (?=[A-Za-z_]+: \S+ +#)")
    mine = tmp_path / "mine.yaml"
    mine.write_text("\n".join([first, *(offered.sub(r"\1", line) for line in rest)]))
    there = resolve(load_experiment(None, [f"cluster={mine}", f"container={ROOT / 'enroot/nemo.yaml'}", *SIZE]), {})
    lines = sbatch_lines(directives(there))
    for option in ("partition", "account", "qos", "constraint", "reservation", "exclude", "time", "gpus-per-node"):
        assert any(line.startswith(f"#SBATCH --{option}=") for line in lines), option
    assert there.cluster.environment["NCCL_SOCKET_IFNAME"] == "eth0"
    assert there.container.mode == "pyxis"


def test_an_array_runs_as_many_at_a_time_as_asked_and_all_of_them_if_nothing_is_asked():
    assert array_line(directives(run(), max_parallel=2)) == "#SBATCH --array=0-599%2"
    assert array_line(directives(run())) == "#SBATCH --array=0-599%600"


def test_the_scripts_own_exit_code_is_the_supervisors():
    options = directives(run())
    for code in (0, 1, 3):
        script = "\n".join([*options["slurm_setup"], f"(exit {code})", *options["slurm_teardown"]])
        assert subprocess.run(["bash", "-c", script], check=False).returncode == code


def test_a_plan_without_anything_for_sbatch_says_so(tmp_path):
    experiment = ExperimentFolder(tmp_path / "roads")
    placed = [PlacedRun(run("cluster.executor=local"), RunFolder(tmp_path / "roads/000-a"), "start")]
    with pytest.raises(ConfigError, match="runs on this machine"):
        planned_batches(placed, experiment, None)
    with pytest.raises(ConfigError, match="nothing to send: see `cosmos-hpc status roads`"):
        planned_batches([PlacedRun(run(), RunFolder(tmp_path / "roads/000-a"), "skip: finished")], experiment, None)


def test_srun_repeats_the_size_and_runs_one_task_a_gpu():
    folder = RunFolder(Path("/runs/roads/000-abc"))
    command = step_command(run("cluster.cpus_per_task=12"), folder, 3)
    assert command[0] == "srun"
    for flag in ("--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12",
                 "--kill-on-bad-exit=1", "--export=ALL", "--job-name=cosmos-ranks"):  # fmt: skip
        assert flag in command
    assert command[-6:] == ["-m", "cosmos_hpc.train", "--run-folder", "/runs/roads/000-abc", "--attempt", "3"]


def test_on_one_machine_the_elastic_launcher_starts_the_same_ranks():
    command = step_command(run("cluster.executor=local"), RunFolder(Path("/r/000-a")), 0)
    assert "torch.distributed.run" in command
    assert "--nproc-per-node=8" in command
    assert command[-6:] == ["-m", "cosmos_hpc.train", "--run-folder", "/r/000-a", "--attempt", "0"]


def test_ranks_get_the_profiles_variables_and_where_to_meet():
    environment = step_environment(run("cluster.environment.NCCL_DEBUG=INFO"), "node1", 20001)
    assert (environment["NCCL_DEBUG"], environment["MASTER_ADDR"], environment["MASTER_PORT"]) == (
        "INFO", "node1", "20001",
    )  # fmt: skip


def test_a_container_sees_code_run_data_and_the_whole_repository_of_cached_weights(tmp_path):
    snapshot = tmp_path / "models--nvidia--tokenizer" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    vgg = tmp_path / "models--timm--vgg" / "snapshots" / "4567" / "model.safetensors"
    networks = [f"loss.lpips.weights={vgg}", "loss.flow.weights=/unused/raft.pth"]
    inside = run("container.mode=pyxis", "container.image=/nemo.sqsh", f"model.jit_ckpt_pth={snapshot}", *networks)
    (mounts,) = [flag for flag in step_command(inside, RunFolder(Path("/r/000-a")), 0) if "container-mounts" in flag]
    for path in ("/r/000-a", "/data/roads", snapshot.parents[1], tmp_path / "models--timm--vgg"):
        assert f"{path}:{path}" in mounts
    assert "unused" not in mounts


def test_a_local_job_sees_the_gpus_that_its_caller_saw(monkeypatch):
    local = run("cluster.executor=local")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as submitit leaves it
    assert "CUDA_VISIBLE_DEVICES" not in step_environment(local, "localhost", 1)
    monkeypatch.setenv("COSMOS_HPC_CUDA_VISIBLE_DEVICES", "2,3")
    assert step_environment(local, "localhost", 1)["CUDA_VISIBLE_DEVICES"] == "2,3"
