"""The map of the rooms in CONTRIBUTING.md, as a test: a room imports from the floors below it only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cosmos_hpc

PACKAGE = Path(cosmos_hpc.__file__).parent
FLOORS = {
    "config": 0, "ranks": 0,
    "data": 1, "tokenizer": 1, "launch": 1,
    "training": 2,
    "job": 3, "report": 3, "preflight": 3, "advice": 3, "tokenize": 3,
    "doctor": 4, "cli_doctor": 4,
    "tables": 4, "names": 4, "api": 4, "cli": 4, "cli_operation": 4, "cli_submission": 4, "cli_data": 4,
    "cli_evidence": 4, "cli_image": 4, "cli_options": 4, "posttrain": 4, "train": 4, "quickstart": 4,
}  # fmt: skip


def imported_rooms(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names if node.module == "cosmos_hpc")
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return {name.split(".")[1] for name in names if name.startswith("cosmos_hpc.")} & FLOORS.keys()


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_room_imports_from_the_floors_below_it_only(file):
    room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    above = {other for other in imported_rooms(file) - {room} if FLOORS[other] >= FLOORS[room] > 0}
    same_top_floor = {other for other in above if FLOORS[other] == FLOORS[room] == 4}
    assert above == same_top_floor, f"{room} is on floor {FLOORS[room]}"


@pytest.mark.parametrize(
    "verb", ["plan", "submit", "status", "cancel", "requeue", "checkpoint-now", "explain", "logs", "image"]
)
def test_verbs_of_the_login_node_import_no_torch(verb, quick_job):
    arguments = {"plan": [str(quick_job)], "submit": [str(quick_job), "data.path=nowhere"], "status": []}
    lines = [
        "import sys",
        "from cosmos_hpc.cli import main",
        f"sys.argv = {['cosmos-hpc', verb, *arguments.get(verb, ['nothing'])]!r}",
        "try: main()",
        "except SystemExit: pass",
        "assert 'torch' not in sys.modules, 'torch was imported'",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, cwd=quick_job.parent)


def test_help_imports_neither_torch_nor_rich(tmp_path):
    lines = [
        "import sys",
        "from cosmos_hpc.cli import main",
        "sys.argv = ['cosmos-hpc', 'plan', '--help']",
        "try: main()",
        "except SystemExit: pass",
        "assert not {'torch', 'rich', 'omegaconf'} & sys.modules.keys()",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, cwd=tmp_path)
