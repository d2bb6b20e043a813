"""`pack --array`: tasks of the launcher's own, here as processes of this machine, share the shards out."""

import json
import time

from small_films import write_films
from typer.testing import CliRunner

from cosmos_hpc.cli import app


def test_tasks_of_this_machine_pack_what_one_call_would(tmp_path):
    write_films(tmp_path / "videos", 6)
    line = ["pack", str(tmp_path / "videos"), "--max-clips-per-shard", "2", "--num-workers", "1"]
    assert CliRunner().invoke(app, [*line, "--out", str(tmp_path / "alone")]).exit_code == 0
    sent = CliRunner().invoke(
        app, [*line, "--out", str(tmp_path / "array"), "--array", "2", "--cluster", "local", "--json"]
    )
    assert sent.exit_code == 0, sent.output
    assert len(json.loads(sent.output)) == 2
    deadline = time.monotonic() + 120
    while not (tmp_path / "array/videos.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    for name in ("shard-000000.tar", "shard-000001.tar", "shard-000002.tar", "videos.jsonl"):
        assert (tmp_path / "array" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
