import pytest

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import load_experiment, resolve
from cosmos_hpc.preflight import check_inputs, with_local_weights


def run(weights: str):
    return resolve(load_experiment(None, ["data.path=/x", f"model.jit_ckpt_pth={weights}"]), {})


def test_weights_on_this_file_system_are_kept_by_their_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    assert with_local_weights(run("weights")).model.jit_ckpt_pth == str(tmp_path / "weights")


def test_a_repository_that_was_not_fetched_is_refused_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"run `cosmos-hpc fetch Cosmos-1\.0-Tokenizer-CV8x8x8` on the login node"):
        with_local_weights(run("Cosmos-1.0-Tokenizer-CV8x8x8"))


@pytest.mark.parametrize("weights", ["/no/such/folder", "./weights"])
def test_a_path_that_does_not_exist_is_refused(weights):
    with pytest.raises(ConfigError, match="does not exist: name a folder"):
        with_local_weights(run(weights))


def test_online_tracking_without_a_key_is_refused(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    config = resolve(load_experiment(None, ["data.path=/x", "wandb.mode=online"]), {})
    with pytest.raises(ConfigError, match="WANDB_API_KEY is not set"):
        check_inputs(config)
