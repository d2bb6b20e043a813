"""The README says what the code does."""

import re
from pathlib import Path

from typer.testing import CliRunner

from cosmos_hpc.cli import app
from cosmos_hpc.cli_image import image
from cosmos_hpc.config.load import known_settings, load_experiment, resolve
from cosmos_hpc.config.reference import BEGIN, END, settings_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_table_of_settings_is_the_schemas():
    table = README.partition(BEGIN)[2].partition(END)[0].strip()
    assert table == settings_table(), "run `make docs`"


def test_every_setting_has_its_meaning_on_the_line_below_it():
    rows = [line.split("|") for line in settings_table().splitlines()[2:]]
    assert len(rows) > 40
    assert all(len(row[3].strip()) > 10 for row in rows)


def test_every_command_of_the_readme_exists_and_every_command_is_in_the_readme():
    said = set(re.findall(r"^cosmos-hpc ([a-z-]+)", README, flags=re.MULTILINE))
    there = {command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands}
    groups = {group.name for group in app.registered_groups}
    assert said == there - {"quickstart"} | groups
    for verb in sorted(there | groups):
        result = CliRunner().invoke(app, [verb, "--help"])
        assert result.exit_code == 0, result.output


def test_the_guides_page_names_commands_settings_and_files_that_there_are():
    text = (ROOT / "docs" / "from-the-guide.md").read_text()
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands} | {"image"}
    assert set(re.findall(r"cosmos-hpc ([a-z]+)", text)) <= verbs
    settings = {name for name, _ in known_settings()}
    groups = {name.partition(".")[0] for name in settings if "." in name}
    named = re.findall(rf"\b((?:{'|'.join(groups)})(?:\.[a-z_0-9]+)+)\b(?![/(])", text)
    assert {name for name in named if not name.endswith((".yaml", ".py", ".pt", ".jit"))} <= settings
    for file in re.findall(r"\b(?:jobs|slurm|enroot)/\w+\.yaml\b", text):
        assert (ROOT / file).is_file(), file


def test_the_page_on_containers_names_settings_variables_and_files_that_there_are():
    text = (ROOT / "docs" / "cluster-setup.md").read_text()
    settings = {name for name, _ in known_settings()}
    named = re.findall(r"\b((?:container|cluster|data)\.[a-z_]+)\b", text)
    assert {name for name in named if not name.endswith((".yaml", ".sbatch"))} <= settings
    there = {command.name or command.callback.__name__ for command in image.registered_commands}
    assert set(re.findall(r"cosmos-hpc image ([a-z]+)", text)) <= there
    for file in re.findall(r"\benroot/[\w-]+\.(?:yaml|sbatch)\b", text):
        assert (ROOT / file).is_file(), file


def test_profiles_of_containers_are_settings_that_load():
    for file in sorted(ROOT.glob("enroot/*.yaml")):
        run = resolve(load_experiment(None, ["cluster=slurm/h100.yaml", f"container={file}"]), {})
        assert run.container.mode == run.cluster.container_mode != "none", file


def test_each_example_opens_with_what_names_it():
    for file in sorted(ROOT.glob("jobs/*.yaml")):
        assert file.read_text().startswith("# cosmos-hpc "), file
    for group, folder in (("cluster", "slurm"), ("container", "enroot")):
        for file in sorted(ROOT.glob(f"{folder}/*.yaml")):
            assert file.read_text().startswith(f"# {group}: "), file


def test_profiles_and_jobs_that_the_documents_name_are_there():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = {
        name
        for page in pages
        for name in re.findall(r"\b(?:slurm|enroot|jobs)/[\w-]+\.(?:yaml|sbatch)", page.read_text())
    }
    assert len(named) > 8
    assert {name for name in named if not (ROOT / name).is_file()} == {"jobs/roads.yaml"}, "the reader's own"


def test_links_between_the_documents_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]:
        links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
        assert [link for link in links if not (page.parent / link).exists()] == [], page
