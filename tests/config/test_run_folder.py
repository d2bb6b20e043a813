from cosmos_hpc.config.load import load_experiment, resolve, to_yaml
from cosmos_hpc.config.run_folder import ExperimentFolder, run_hash, write_atomically


def run(*overrides: str):
    return resolve(load_experiment(None, ["data.path=/x", *overrides]), {})


def test_settings_that_do_not_change_the_result_do_not_name_the_run():
    neutral = [
        "data.num_workers=3",
        "data.micro_batch_size=4",
        "trainer.devices=2",
        "trainer.num_nodes=1",
        "trainer.log_every_n_steps=1",
        "checkpoint.keep=9",
        "cluster.partition=fast",
        "wandb.mode=disabled",
    ]
    assert run_hash(run(*neutral)) == run_hash(run())


def test_settings_that_change_the_result_name_the_run():
    changed = ["data.global_batch_size=16", "optim.lr=1e-5", "trainer.max_steps=7", "model.channels=16", "data.path=/y"]
    assert len({run_hash(run(change)) for change in changed} | {run_hash(run())}) == len(changed) + 1


def test_a_run_keeps_its_folder_when_the_sweep_grows_in_front_of_it(tmp_path):
    experiment = ExperimentFolder(tmp_path)
    first = experiment.place([run("trainer.seed=1")])[0]
    assert first.path.name == f"000-{run_hash(run('trainer.seed=1'))}"
    write_atomically(first.config, to_yaml(run("trainer.seed=1")))
    grown = experiment.place([run("trainer.seed=0"), run("trainer.seed=1")])
    assert [folder.path.name[:3] for folder in grown] == ["001", "000"]
    assert grown[1] == first


def test_runs_that_differ_in_nodes_or_time_alone_have_names_of_their_own(tmp_path):
    def names(*changes: str) -> list[str]:
        placed = ExperimentFolder(tmp_path).place([run(*change.split()) for change in changes])
        return [folder.path.name.partition("-")[2] for folder in placed]

    one, two, other = names("trainer.num_nodes=1", "trainer.num_nodes=2", "optim.lr=1e-5")
    assert len({one, two, other}) == 3
    assert other == run_hash(run("optim.lr=1e-5")), "only twins are told apart"
    four = "trainer.num_nodes=4"
    assert names(four, "trainer.num_nodes=2", "trainer.num_nodes=1")[1:] == [two, one], "when the sweep grows as well"
    moved = [f"trainer.num_nodes={nodes} cluster.partition=fast data.num_workers=3" for nodes in (1, 2)]
    assert names(*moved) == [one, two], "what is the same for both may change"
    timed = names("cluster.time_limit_min=60", "cluster.time_limit_min=120")
    assert len({*timed, run_hash(run())}) == 3


def test_newest_checkpoint_is_the_whole_one_of_the_latest_step(tmp_path):
    folder = ExperimentFolder(tmp_path).place([run()])[0]
    assert folder.newest_checkpoint() is None
    for name in ("step_00000009", "step_00000010", "step_00000011.partial"):
        (folder.checkpoints / name).mkdir(parents=True)
    assert folder.newest_checkpoint() == folder.checkpoint(10)
