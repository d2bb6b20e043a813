from pathlib import Path

import pytest

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import find_shipped, load_experiment, read_run_config, resolve, to_yaml

JOB = """\
name: roads
data: {path: /data/roads, num_frames: 33}
optim: {lr: 3e-4}
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "roads.yaml"
    path.write_text(JOB)
    return path


def settings(path: Path | None, *overrides: str):
    return resolve(load_experiment(path, overrides), {})


def refusal(path: Path | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        settings(path, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_file_sets_what_it_names_and_leaves_the_rest_at_its_default(job):
    run = settings(job)
    assert (run.name, run.data.num_frames, run.optim.lr, run.optim.betas) == ("roads", 33, 3e-4, (0.5, 0.999))


def test_an_override_lies_on_top_of_the_file_and_takes_the_type_of_its_field(job):
    run = settings(job, "optim.lr=3e-5", "optim.betas=[0.9, 0.99]", "data.num_frames=17")
    assert (run.optim.lr, run.optim.betas, run.data.num_frames) == (3e-5, (0.9, 0.99), 17)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.num_frame=33", "did you mean data.num_frames?"),
        ("trainer.max_stps=3", "did you mean trainer.max_steps?"),
        ("num_frames=33", "did you mean data.num_frames?"),
        ("dta.path=/x", "did you mean data?"),
        ("loss.l1.wieght=1", "did you mean loss.l1.weight?"),
        ("sweep.max_parralel=1", "did you mean sweep.max_parallel?"),
        ("optim.learning_rate=1", "did you mean optim.lr?"),
        ("trainer.gpus=8", "did you mean trainer.devices?"),
        ("wandb.colour=red", "there are wandb.mode, "),
    ],
)
def test_unknown_override_names_the_nearest_known_one(job, override, words):
    message = refusal(job, override)
    assert words in message
    assert message.startswith(f"command line: {override.partition('=')[0].split('.')[0]}")


def test_a_setting_that_would_do_harm_is_refused_with_the_reason(job):
    assert refusal(job, "optim.overlap_param_gather=true") == (
        "command line: optim.overlap_param_gather is refused, since the average of the weights and validation would "
        "read weights not yet gathered: leave it out"
    )


def test_unknown_key_in_a_file_names_the_file_and_the_nearest_known_one(job):
    job.write_text(JOB + "trainer: {max_step: 3}\n")
    assert refusal(job) == f"{job}: trainer.max_step is no setting: did you mean trainer.max_steps?"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.num_frames=16", "takes 1 + 8k: set 9 or 17"),
        ("data.crop_size=100", "takes multiples of 8: set 96 or 104"),
        ("data.global_batch_size=6", "must be a multiple of data.micro_batch_size x ranks = 4 x 1: set 4 or 8"),
        ("data.global_batch_size=2", "= 4 x 1: set 4"),
        ("data.micro_batch_size=0", "data.micro_batch_size is 0: set a number of clips, at least 1, or auto"),
        ("data.micro_batch_size=most", "data.micro_batch_size is most: set a number of clips, at least 1, or auto"),
        ("data.num_frames=ten", "data.num_frames: Value 'ten'"),
        ("data=3", "data is 3, but is a group of settings"),
        ("optim.lr=-1", "optim.lr is -1.0, but must be above 0"),
        ("optim.lr_schedule=step", "set constant, cosine or linear"),
        ("optim.min_lr=1", "must lie between 0 and optim.lr"),
        ("optim={lr_schedule: cosine, decay_steps: 200}", "ends at step 200"),
        ("model.model=VGG", "names no Cosmos video tokenizer"),
        ("trainer.precision=fp8", "set bf16"),
        ("cluster=nowhere", "there is no such file: see slurm/*.yaml"),
        ("name=../up", "names a folder"),
        ("optim.lr", "write group.name=value"),
        ("data.shapes={9x32x32:1}", "there is no value: write NAME: VALUE, with a space between"),
        ("data.shapes={9x30x32: 1}", "data.shapes: 9x30x32, height, is 30, but"),
    ],
)
def test_impossible_value_is_refused_with_the_mend(job, override, words):
    assert words in refusal(job, "data.micro_batch_size=4", override)


@pytest.mark.parametrize(
    ("overrides", "sizes"),
    [
        (["trainer.devices=2", "data.global_batch_size=24"], [1, 2, 3, 4, 6, 12]),
        (["trainer.num_nodes=4", "data.global_batch_size=24"], [1, 2, 3, 6]),
        (["trainer.num_nodes=4", "trainer.min_nodes=3", "data.global_batch_size=24"], [1, 2]),
        (["trainer.num_nodes=4", "trainer.min_nodes=2", "data.global_batch_size=16"], [1, 2, 4]),
    ],
    ids=["two ranks", "four nodes", "four or three nodes", "three nodes can't share it anyway"],
)
def test_a_measured_micro_batch_has_to_fit_any_number_of_nodes(job, overrides, sizes):
    assert settings(job, "data.micro_batch_size=auto", *overrides).fitting_micro_batches == sizes


def test_a_latent_frame_of_four_takes_other_clip_lengths_than_one_of_eight(job):
    assert settings(job, "model.model=Cosmos-0.1-Tokenizer-CV4x8x8", "data.num_frames=5").data.num_frames == 5
    assert "takes 1 + 4k" in refusal(job, "model.model=Cosmos-0.1-Tokenizer-CV4x8x8", "data.num_frames=7")


def test_environment_expands_in_paths_and_nowhere_else(job, monkeypatch):
    monkeypatch.setenv("ROADS", "/mnt/roads")
    assert settings(job, "data.path=${ROADS}/v2").data.path == "/mnt/roads/v2"
    assert "variables expand only in" in refusal(job, "model.model=${ROADS}")
    assert "not set: export it first" in refusal(job, "data.path=$NOT_THERE/v2")


def test_relative_paths_are_kept_whole_since_jobs_start_elsewhere(job, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert settings(job, "data.path=roads").data.path == str(tmp_path / "roads")
    assert settings(job, "data.path=s3://bucket/roads").data.path == "s3://bucket/roads"


def test_a_profile_is_read_by_name_and_its_fields_can_be_overridden(job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("executor: slurm\npartition: fast\nenvironment: {NCCL_DEBUG: INFO}\n")
    job.write_text(JOB + "cluster: mine.yaml\n")
    cluster = settings(job, "cluster.time_limit_min=30").cluster
    assert (cluster.executor, cluster.partition, cluster.time_limit_min) == ("slurm", "fast", 30)
    assert cluster.environment == {"NCCL_DEBUG": "INFO"}
    assert settings(job, "cluster=local").cluster.partition is None


@pytest.mark.parametrize(
    ("text", "words"),
    [("data: {path: /x, path: /y}", "duplicate"), ("data: [", "line "), ("- a\n- b\n", "holds a list")],
)
def test_malformed_file_is_refused_in_one_line(tmp_path, text, words):
    job = tmp_path / "broken.yaml"
    job.write_text(text)
    assert words in refusal(job)


def test_a_job_that_comes_with_the_package_is_found_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert load_experiment(Path("jobs/quickstart.yaml")).settings["name"] == "quickstart"


def test_a_bad_value_tells_that_there_are_overrides_but_not_their_values(job):
    message = refusal(job, "optim.lr=fast", "name=quiet")
    assert message.startswith(f"{job} with optim.lr, name: optim.lr: Value 'fast'")
    assert "quiet" not in message


def test_missing_file_names_a_near_one(job):
    assert "did you mean" in refusal(job.with_name("road.yaml"))


def test_settings_written_to_yaml_read_back_equal(job, tmp_path):
    run = settings(job, "cluster.environment.A=b", "container.mounts=[/data:/data]", "optim.betas=[0.8, 0.9]")
    written = tmp_path / "config.yaml"
    written.write_text(to_yaml(run))
    assert read_run_config(written) == run


def test_an_experiment_without_a_cluster_goes_to_slurm_where_there_is_sbatch(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert resolve(load_experiment(None), {}).cluster.executor == "local"
    (tmp_path / "sbatch").touch(0o755)
    assert resolve(load_experiment(None), {}).cluster.executor == "slurm"
    assert resolve(load_experiment(None, ["cluster=local"]), {}).cluster.executor == "local"
    quickstart = load_experiment(find_shipped("jobs/quickstart.yaml"))
    assert resolve(quickstart, {}).cluster.executor == "local", "it says so"


def test_one_name_to_come_after_needs_no_brackets(tmp_path):
    job = tmp_path / "job.yaml"
    job.write_text("after: pack_roads\n")
    assert list(resolve(load_experiment(job), {}).after) == ["pack_roads"]
    assert list(resolve(load_experiment(job, ["after=1234"]), {}).after) == ["1234"]
    assert list(resolve(load_experiment(job, ["after=[a, b]"]), {}).after) == ["a", "b"]


@pytest.mark.parametrize("group", ["container", "cluster"])
def test_a_secret_in_the_environment_of_a_profile_is_refused_without_its_value(job, group):
    with pytest.raises(ConfigError, match=rf"{group}.environment sets MY_API_KEY.*export it before") as refusal:
        settings(job, f"{group}.environment.MY_API_KEY=hush")
    assert "hush" not in str(refusal.value)


@pytest.mark.parametrize("mount", ["/data", "data:/data", "/data:data", "/my data:/data", "/a:/b,/c:/d"])
def test_a_mount_that_enroot_would_stumble_over_is_refused(job, mount):
    with pytest.raises(ConfigError, match="write SOURCE:TARGET or SOURCE:TARGET:ro"):
        settings(job, f"container.mounts=['{mount}']")


def test_the_cluster_says_how_images_run_unless_the_container_does():
    cluster = "cluster={executor: slurm, container_mode: enroot}"
    assert settings(None, cluster, "container.image=/nemo.sqsh").container.mode == "enroot"
    assert settings(None, cluster, "container={image: /nemo.sqsh, mode: pyxis}").container.mode == "pyxis"
    assert settings(None, cluster).container.mode == "none"
    assert settings(None, "cluster=local", "container.image=/nemo.sqsh").container.mode == "none"
    assert "says how the cluster runs images: set pyxis" in refusal(
        None, "cluster.executor=slurm", "container.image=/nemo.sqsh"
    )
    assert "cluster.container_mode is 'docker': set pyxis or enroot" in refusal(None, "cluster.container_mode=docker")
