import json

import pytest

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import load_experiment, resolve
from cosmos_hpc.preflight import _cached_network, check_inputs, with_local_image, with_local_weights, with_num_steps


def run(weights: str):
    return resolve(load_experiment(None, ["data.path=/x", f"model.jit_ckpt_pth={weights}", "loss.lpips.weight=0"]), {})


def test_weights_on_this_file_system_are_kept_by_their_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    assert with_local_weights(run("weights")).model.jit_ckpt_pth == str(tmp_path / "weights")


def test_a_repository_that_was_not_fetched_is_refused_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"run `cosmos-hpc fetch Cosmos-1\.0-Tokenizer-CV8x8x8` on the login node"):
        with_local_weights(run("Cosmos-1.0-Tokenizer-CV8x8x8"))


@pytest.mark.parametrize("term", ["lpips", "gram", "flow"])
def test_a_loss_network_that_was_not_fetched_is_refused_unless_its_weight_is_never_above_zero(
    tmp_path, monkeypatch, term
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    off = ["loss.lpips.weight=0", "loss.gram.weight=0", "loss.flow.weight=0", "loss.flow.weights=acme/raft:large.pth"]
    config = resolve(load_experiment(None, off), {})
    assert with_local_weights(config) == config
    with pytest.raises(ConfigError, match=rf"run `cosmos-hpc fetch` with --loss-networks .*loss\.{term}\.weight=0"):
        with_local_weights(resolve(load_experiment(None, [*off, f"loss.{term}.weight=0.1"]), {}))


def test_a_fetched_loss_network_becomes_a_path_and_a_missing_one_is_refused(tmp_path, monkeypatch):
    cache = tmp_path / "models--timm--vgg16.tv_in1k"
    file = cache / "snapshots" / "0123" / "model.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    _cached_network.cache_clear()
    config = resolve(load_experiment(None, []), {})
    assert with_local_weights(config).loss.lpips.weights == str(file)
    (tmp_path / "own.pth").write_bytes(b"weights")
    own = resolve(load_experiment(None, [f"loss.lpips.weights={tmp_path / 'own.pth'}"]), {})
    assert with_local_weights(own) == own
    with pytest.raises(ConfigError, match=r"loss\.lpips\.weights is /no/vgg\.pth, which does not exist: name a file"):
        with_local_weights(resolve(load_experiment(None, ["loss.lpips.weights=/no/vgg.pth"]), {}))
    _cached_network.cache_clear()


@pytest.mark.parametrize("weights", ["/no/such/folder", "./weights"])
def test_a_path_that_does_not_exist_is_refused(weights):
    with pytest.raises(ConfigError, match="does not exist: name a folder"):
        with_local_weights(run(weights))


def test_online_tracking_without_a_key_is_refused(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    config = resolve(load_experiment(None, ["data.path=/x", "wandb.mode=online"]), {})
    with pytest.raises(ConfigError, match="WANDB_API_KEY is not set"):
        check_inputs(config)


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (["trainer.max_epochs=3"], 8),  # eight videos, three clips a step: 24 clips
        (["trainer.max_epochs=4"], 11),
        (["trainer.max_epochs=1000"], 2667),
        (["trainer.max_epochs=3", "trainer.max_steps=5"], 5),
        (["trainer.max_epochs=null"], 5000),
    ],
)
def test_passes_over_the_videos_become_steps(dataset, overrides, steps):
    batch = ["data.global_batch_size=3", f"data.path={dataset}"]
    run = with_num_steps(resolve(load_experiment(None, [*batch, *overrides]), {}))
    assert run.trainer.max_steps == steps


def test_passes_over_what_has_no_end_are_refused(tmp_path):
    (tmp_path / "blend.yaml").write_text("")
    blend = [f"data.path={tmp_path / 'blend.yaml'}", "trainer.max_epochs=2"]
    with pytest.raises(ConfigError, match=r"blends datasets and has no end: set trainer\.max_steps"):
        with_num_steps(resolve(load_experiment(None, blend), {}))


def test_a_second_dataset_is_refused_by_its_own_name(dataset):
    settings = [f"data.path={dataset}", "data.general_path=/no/such", "data.num_workers=1"]
    with pytest.raises(ConfigError, match=r"data\.general_path is /no/such, which is not there"):
        check_inputs(resolve(load_experiment(None, settings), {}))


def test_a_run_in_a_container_gets_the_imported_file_and_mounts_of_a_blends_parts(tmp_path, monkeypatch):
    image = tmp_path / "images" / "a.sqsh"
    image.parent.mkdir()
    image.write_bytes(b"hsqs")
    manifest = {"name": "nvcr.io/nvidia/nemo:25.02", "digest": None, "size": 4, "imported": "2026", "made_by": "",
                "packages": {}}  # fmt: skip
    image.with_name("a.sqsh.json").write_text(json.dumps(manifest))
    blend = tmp_path / "blend.yaml"
    blend.write_text("splits: {train: {blend: [{path: roads, weight: 1}, {path: /data/rain, weight: 1}]}}")
    monkeypatch.setenv("COSMOS_HPC_IMAGES", str(image.parent))
    settings = ["container.mode=enroot", "container.image=nvcr.io#nvidia/nemo:25.02", f"data.path={blend}"]
    run = with_local_image(resolve(load_experiment(None, settings), {}))
    assert run.container.image == str(image)
    assert run.container.mounts == (f"{tmp_path}/roads:{tmp_path}/roads", "/data/rain:/data/rain")
    other = resolve(load_experiment(None, [*settings, "container.image=nvcr.io/nvidia/nemo:25.04"]), {})
    assert with_local_image(other).container.image == "nvcr.io/nvidia/nemo:25.04"
