"""YAML files and dotted overrides to typed settings; every refusal names the key, the place and the mend."""

import dataclasses
import difflib
import functools
import os
import re
import shutil
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.config.sweep_schema import SweepConfig
from cosmos_hpc.config.typed import Variants, first_line, known_settings, typed

_NOT_WRITTEN = object()

_REFUSED = {
    "optim.overlap_param_gather": "the average of the weights and validation would read weights not yet gathered",
}
"""Settings of Megatron-Core that would do harm here, and why."""

_OTHER_NAMES = {
    "batch_size": "data.micro_batch_size",
    "gan": "loss.adversarial",
    "gpus": "trainer.devices",
    "learning_rate": "optim.lr",
    "nodes": "trainer.num_nodes",
    "num_gpus": "trainer.devices",
    "perceptual": "loss.lpips",
    "vgg": "loss.lpips",
    "walltime": "cluster.time_limit_min",
}
"""What other tools call things."""

_FAST_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Five times as fast where PyYAML was built with libyaml; good for files that `to_yaml` wrote."""

_FAST_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
"""Several times as fast where PyYAML was built with libyaml; good for what `to_yaml` writes."""

NO_LIMIT = 10_000_000
"""Steps that no run gets to."""

_PEEKED = (r"^trainer:\n(?:  .*\n)*?  max_steps: (\d+)$", r"^cluster:\n(?:  .*\n)*?  executor: (slurm|local)$")
"""Where `to_yaml` writes the two settings that `status` needs."""

PROFILE_GROUPS = ("cluster", "container")
"""Groups that YAML may give by the name of a file."""

SHIPPED = (Path(__file__).parents[2], Path(__file__).parents[1] / "shipped")
"""Where jobs/, slurm/ and enroot/ lie: beside the package in a checkout, inside it in a wheel."""


@dataclass(frozen=True)
class Experiment:
    """An experiment file as written: settings before the sweep has chosen, and the sweep."""

    source: str
    """Where the settings come from, for messages."""

    settings: dict[str, Any]
    """Nested as in YAML, checked for unknown keys; values as written."""

    sweep: SweepConfig
    """What varies."""


def load_experiment(path: Path | None, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment file and lay `key=value` overrides on top.

    An override of a key that the sweep varies takes it out of the sweep.

    Args:
        path: YAML file; none for overrides alone, on the defaults.
        overrides: such as `optim.lr=3e-5`.

    Raises:
        ConfigError: for a missing or malformed file, an unknown key, a profile that does not exist.
    """
    source = "command line" if path is None else str(path)
    written = {} if path is None else _with_profiles(_read_mapping(find_shipped(str(path)) or path), source)
    changes = _with_profiles(_parse_overrides(overrides), "command line")
    for settings, origin in ((written, source), (changes, "command line")):
        _refuse_unknown_keys(settings, origin)
    merged = _merge(written, changes)
    sweep = merged.pop("sweep", None) or {}
    _take_out(sweep, set(_dotted_keys(changes)), source)
    if "cluster" not in merged and shutil.which("sbatch"):
        merged["cluster"] = {"executor": "slurm"}
    if isinstance(merged.get("after"), str | int):
        merged["after"] = [str(merged["after"])]  # one is written without brackets
    _run_images_as_the_cluster_does(merged, source)
    named = ", ".join(override.partition("=")[0] for override in overrides)  # a value may be secret
    whence = f"{source} with {named}" if path is not None and named else source
    experiment = Experiment(whence, merged, typed(SweepConfig, sweep, whence))
    _let_epochs_decide(experiment)
    for key in experiment.sweep.keys:
        _refuse_unknown_setting(key, f"{source}: sweep")
        if key == "name":
            raise ConfigError(f"{source}: sweep: name is the experiment's, which all its runs share: take it out")
    return experiment


def _run_images_as_the_cluster_does(settings: dict[str, Any], source: str) -> None:
    """Where an image is named and no mode, the cluster's profile says how its nodes run images."""
    cluster, container = settings.get("cluster") or {}, settings.get("container") or {}
    if container.get("image") is None or container.get("mode") is not None or cluster.get("executor") != "slurm":
        return
    if cluster.get("container_mode") is None:
        raise ConfigError(
            f"{source}: container.image is set, but neither cluster.container_mode nor container.mode says how the "
            "cluster runs images: set pyxis or enroot, or none to leave it out"
        )
    settings["container"] = {**container, "mode": cluster["container_mode"]}


def _let_epochs_decide(experiment: Experiment) -> None:
    """Where only `trainer.max_epochs` is given, the default of `trainer.max_steps` is no limit."""
    trainer = experiment.settings.get("trainer") or {}
    given = {f"trainer.{name}" for name, value in trainer.items() if value is not None} | set(experiment.sweep.keys)
    if "trainer.max_epochs" in given and "trainer.max_steps" not in given:
        experiment.settings["trainer"] = {**trainer, "max_steps": NO_LIMIT}


def resolve(experiment: Experiment, choices: Mapping[str, Any]) -> RunConfig:
    """The run that an experiment becomes under one choice of its sweep.

    Args:
        experiment: from `load_experiment`.
        choices: dotted setting to value.

    Raises:
        ConfigError: for a value that can't work.
    """
    return next(resolve_all(experiment, [choices]))


def resolve_all(experiment: Experiment, rows: Sequence[Mapping[str, Any]]) -> Iterator[RunConfig]:
    """The runs that an experiment becomes under several choices of its sweep; some 0.2 ms each.

    Raises:
        ConfigError: for a value that can't work.
    """
    source = experiment.source
    variants = Variants(RunConfig, _expanded(experiment.settings, source), source)
    for choices in rows:
        expanded = {key: _expanded(value, source, key) for key, value in choices.items()}
        yield variants.make(expanded, source + "".join(f", {key}={value}" for key, value in choices.items()))


def read_run_config(path: Path) -> RunConfig:
    """The settings that a run folder's config.yaml holds; some milliseconds each, for `status` of a thousand runs.

    Raises:
        ConfigError: if the file is missing or not of this version's form.
    """
    settings = _read_mapping(path, lambda text: yaml.load(text, _FAST_LOADER))
    _refuse_unknown_keys(settings, str(path))
    return typing.cast(RunConfig, _defaults().make(_leaves(settings), str(path)))


def peek(path: Path) -> tuple[int, str]:
    """trainer.max_steps and cluster.executor of a run folder's config.yaml: all of it would take `status` seconds.

    Raises:
        ConfigError: if the file is missing or not of this version's form.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        text = ""
    steps, executor = (re.search(pattern, text, re.M) for pattern in _PEEKED)
    if steps is not None and executor is not None:
        return int(steps[1]), executor[1]
    run = read_run_config(path)  # edited by hand, or broken
    return run.trainer.max_steps, run.cluster.executor


@functools.cache
def _defaults() -> Variants:
    return Variants(RunConfig, {}, "defaults")


def _leaves(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted setting to value, of those that are written."""
    leaves = {}
    for key, _ in known_settings():
        value: Any = settings
        for part in key.split("."):
            value = value.get(part, _NOT_WRITTEN) if isinstance(value, Mapping) else _NOT_WRITTEN
        if value is not _NOT_WRITTEN:
            leaves[key] = value
    return leaves


def to_yaml(run: RunConfig) -> str:
    """All settings of a run as YAML that `read_run_config` reads back."""
    return yaml.dump(dataclasses.asdict(run), Dumper=_FAST_DUMPER, sort_keys=False, allow_unicode=True)


def find_shipped(name: str) -> Path | None:
    """A file named from the working folder, or else from among those that come with the package."""
    return next((path for path in (Path(name), *(root / name for root in SHIPPED)) if path.is_file()), None)


def _read_as_written(text: str) -> Any:
    """OmegaConf's reading of YAML: `1e-4` is a number, and no key may come twice."""
    return OmegaConf.to_container(OmegaConf.create(text))


def _read_mapping(path: Path, read: Callable[[str], Any] = _read_as_written) -> dict[str, Any]:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*.yaml")], n=1)
        mend = f"did you mean {path.parent / near[0]}?" if near else "check the path"
        raise ConfigError(f"{path} is no file: {mend}")
    try:
        container = read(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{path}{place}: not valid YAML: {problem}; quote values that hold {{ }} [ ] or :") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no text in UTF-8: name an experiment file") from None
    if not isinstance(container, dict):
        raise ConfigError(f"{path} holds a list, but settings are `group: {{name: value}}`: see jobs/quickstart.yaml")
    return typing.cast(dict[str, Any], container)


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{override!r} is no override: write group.name=value, such as optim.lr=3e-5")
    try:
        return typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides))))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        words = " ".join(overrides)
        raise ConfigError(f"{words}: a value is no valid YAML ({first_line(error)}): quote it") from None


def _with_profiles(settings: dict[str, Any], source: str) -> dict[str, Any]:
    """Put the content of `cluster: slurm/h100.yaml` and the like in the place of the name."""
    folders = {"cluster": "slurm", "container": "enroot"}
    for group in PROFILE_GROUPS:
        name = settings.get(group)
        if isinstance(name, str):
            path = find_shipped(name) or find_shipped(f"{folders[group]}/{name}.yaml")
            if path is None:
                mend = f"see {folders[group]}/*.yaml" + ("; container.mode=none goes without" * (group == "container"))
                raise ConfigError(f"{source}: {group} is {name!r}, but there is no such file: {mend}")
            settings[group] = _Profile(_read_mapping(path))
    return settings


class _Profile(dict[str, Any]):
    """A group read from its own file: replaces the group below it as a whole."""


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` on top of `below`; a group without content (`optim:`) changes nothing."""
    groups = _known_keys()[0]
    merged = {key: value for key, value in below.items() if value is not None or key not in groups}
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict) and not isinstance(value, _Profile):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _dotted_keys(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in settings.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _dotted_keys(value, f"{prefix}{key}.")


def _refuse_unknown_keys(settings: Mapping[str, Any], source: str) -> None:
    groups, leaves, free = _known_keys()
    for key in _dotted_keys(settings):
        group = key.rpartition(".")[0]
        if key in _REFUSED:
            raise ConfigError(f"{source}: {key} is refused, since {_REFUSED[key]}: leave it out")
        if key in groups:
            _refuse_non_mapping(settings, key, source)
        elif key not in leaves and (group == "" or group in groups):
            raise ConfigError(f"{source}: {key} is no setting: {_nearest(key, [*groups, *leaves])}")
        elif key not in leaves and not any(key.startswith(f"{name}.") for name in free):
            raise ConfigError(f"{source}: {key}: {group} is a single value and holds no settings")


def _refuse_non_mapping(settings: Mapping[str, Any], group: str, source: str) -> None:
    value: Any = settings
    for part in group.split("."):
        value = value[part]
    if value is not None and not isinstance(value, dict):
        example = next(name for name in _known_keys()[1] if name.startswith(f"{group}."))
        raise ConfigError(f"{source}: {group} is {value!r}, but is a group of settings: write {example}: ...")


def _refuse_unknown_setting(key: str, source: str) -> None:
    leaves = [name for name, _ in known_settings()]
    if key not in leaves:
        raise ConfigError(f"{source}: {key} is no setting: {_nearest(key, leaves)}")


def _known_keys() -> tuple[list[str], list[str], list[str]]:
    """Groups, settings, and those settings that are mappings with keys of the user's choice."""
    items = [*known_settings(), *known_settings(SweepConfig, "sweep.")]
    leaves = [name for name, _ in items]
    groups = {".".join(name.split(".")[:depth]) for name in leaves for depth in range(1, name.count(".") + 1)}
    return sorted(groups), leaves, [name for name, item in items if typing.get_origin(item.type) is dict]


def _nearest(key: str, known: Sequence[str]) -> str:
    """What somebody who wrote an unknown key may have meant."""
    group, _, last = key.rpartition(".")
    by_whole = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    by_last = [name for name in known if name.rpartition(".")[2] == last]
    by_habit = [_OTHER_NAMES[last]] if last in _OTHER_NAMES else []
    near = by_whole or by_last or by_habit or difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if near:
        return f"did you mean {near[0]}?"
    beside = [name for name in known if name.rpartition(".")[0] == group]
    return f"there are {', '.join(beside)}" if beside else "see the table in README.md"


def _expanded(settings: Any, source: str, key: str = "") -> Any:
    """Expand the environment where a setting allows it, and refuse `${` elsewhere.

    Args:
        settings: nested as in YAML, or one value.
        source: for messages.
        key: of that value.
    """
    allowed = _expanding_settings()

    def walk(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {name: walk(child, f"{key}.{name}".lstrip(".")) for name, child in value.items()}
        if isinstance(value, str) and key in allowed:
            return _whole(_expand(value, key, source), allowed[key])
        if isinstance(value, str) and "${" in value:
            raise ConfigError(
                f"{source}: {key} is {value!r}, but variables expand only in "
                f"{', '.join(sorted(allowed))}: write the value"
            )
        return value

    return walk(settings, key)


@functools.cache
def _expanding_settings() -> dict[str, Mapping[str, Any]]:
    return {name: item.metadata for name, item in known_settings() if item.metadata.get("expands")}


def _expand(value: str, key: str, source: str) -> str:
    expanded = os.path.expandvars(Path(value).expanduser() if value.startswith("~") else value)
    if "$" in expanded:
        raise ConfigError(f"{source}: {key} is {value!r}, which names a variable that is not set: export it first")
    return expanded


def _whole(value: str, metadata: Mapping[str, Any]) -> str:
    """A relative path made absolute, where the field holds one."""
    is_path = metadata.get("is_path", False) and "://" not in value
    is_name = metadata.get("may_be_repository", False) and not Path(value).exists()
    return str(Path(value).resolve()) if is_path and not is_name else value


def _take_out(sweep: dict[str, Any], overridden: set[str], source: str) -> None:
    """Leave the keys that an override has decided out of every form of a sweep."""
    for form in ("grid", "zip"):
        sweep[form] = _lists_of(sweep.get(form), f"{source}: sweep.{form}", without=overridden)
    rows = sweep.get("list")
    if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
        left = [{key: value for key, value in row.items() if key not in overridden} for row in rows]
        sweep["list"] = left if left == rows or any(left) else []
    draws = sweep.get("random")
    if isinstance(draws, dict) and isinstance(settings := draws.get("settings"), dict) and settings:
        draws["settings"] = {key: value for key, value in settings.items() if key not in overridden}
        if not draws["settings"]:
            del sweep["random"]


def _lists_of(values: Any, key: str, without: set[str]) -> dict[str, list[Any]]:
    """The lists of a sweep's form, less the keys that an override has decided."""
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(value, list) for value in values.values()):
        raise ConfigError(f"{key} is {values!r}, but takes lists by setting: write {{optim.lr: [1e-4, 3e-5]}}")
    return {name: value for name, value in values.items() if name not in without}
