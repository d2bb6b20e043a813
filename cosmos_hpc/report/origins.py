"""Where a run comes from, and what it could not use."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from cosmos_hpc.report.run_data import RunRecord

SHOWN = 20
"""Videos of the quarantine that are named on the page."""


class Quarantine(NamedTuple):
    """Videos that a run left out."""

    run: str
    num_videos: int
    faults: list[tuple[str, int]]
    """Fault and number of videos, most frequent first."""

    first: list[dict[str, Any]]
    """Shard, key, fault and reason of the first ones."""


class Origin(NamedTuple):
    """Code, packages and machine that some runs were laid out with."""

    runs: list[str]
    facts: list[tuple[str, str]]
    diff: str
    """Of the code against its commit; empty where there is none."""


def quarantine_of(record: RunRecord) -> Quarantine:
    """What quarantine.jsonl holds; a last line that is still being written is left out."""
    path = record.folder.quarantine
    *lines, _unfinished = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
    found = [json.loads(line) for line in lines if line.strip()]
    faults = Counter(str(each.get("fault")) for each in found)
    return Quarantine(record.name, len(found), faults.most_common(), found[:SHOWN])


def origins_of(records: Sequence[RunRecord]) -> list[Origin]:
    """What provenance.json tells of the newest start of each run, runs with the same code and packages together."""
    groups: dict[str, list[tuple[RunRecord, list[dict[str, Any]]]]] = {}
    for record in records:
        path = record.folder.provenance
        starts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        if starts:
            same = {name: starts[-1].get(name) for name in ("git_commit", "git_diff", "packages", "python")}
            groups.setdefault(json.dumps(same, sort_keys=True), []).append((record, starts))
    return [_origin(group) for group in groups.values()]


def _origin(group: Sequence[tuple[RunRecord, list[dict[str, Any]]]]) -> Origin:
    earlier = [(record, start) for record, starts in group for start in starts[:-1]]
    written = group[0][1][-1]
    packages = written.get("packages") or {}
    diff = str(written.get("git_diff") or "")
    changed = f", {len(diff.splitlines())} lines of uncommitted changes" if diff else ""
    command = written.get("command") or []
    facts = [
        ("cosmos-hpc", f"{written.get('cosmos_hpc')}, commit {written.get('git_commit') or 'unknown'}{changed}"),
        ("laid out", f"{written.get('time')} by {written.get('user')} on {written.get('host')}"),
        ("command", " ".join(map(str, command))),
        *(
            (f"{record.name} earlier", f"{start.get('time')}, commit {start.get('git_commit') or 'unknown'}")
            for record, start in earlier
        ),
        ("python", str(written.get("python"))),
        *((str(name), str(version)) for name, version in packages.items() if version),
    ]
    known = {"time", "user", "host", "command", "python", "cosmos_hpc", "git_commit", "git_diff", "packages"}
    facts += [(name, json.dumps(value)) for name, value in written.items() if name not in known]
    return Origin([record.name for record, _ in group], facts, diff)
