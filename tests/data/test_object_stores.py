"""Datasets in an object store are read as they are: msc:// by a profile, s3:// from a server on this machine."""

import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml
from batches import equal, take
from small_videos import video_of

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import load_experiment, resolve
from cosmos_hpc.data.dataset_index import check_dataset
from cosmos_hpc.data.loader import ValidationLoader
from cosmos_hpc.preflight import check_inputs, with_num_steps


@pytest.fixture
def shelf(dataset, tmp_path, monkeypatch) -> str:
    """The dataset as msc://shelf/roads."""
    profile = {"type": "file", "options": {"base_path": str(dataset.parent)}}
    (tmp_path / "msc.yaml").write_text(yaml.safe_dump({"profiles": {"shelf": {"storage_provider": profile}}}))
    monkeypatch.setenv("MSC_CONFIG", str(tmp_path / "msc.yaml"))
    return f"msc://shelf/{dataset.name}"


class Bucket(BaseHTTPRequestHandler):
    """A double of S3, as far as a reader asks: objects in whole or in part, what there is of one, and lists."""

    protocol_version = "HTTP/1.1"
    root: Path
    asked: list[str]

    def do_GET(self) -> None:
        target = urlsplit(self.path)
        if "list-type" in (query := parse_qs(target.query)):
            self.answer(200, self.listed(query.get("prefix", [""])[0]))
            return
        file = self.file()
        if file is None:
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        self.asked.append(file.name)
        raw = file.read_bytes()
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if first:
            part = raw[int(first) : int(last) + 1 if last else None]
            span = f"bytes {first}-{int(first) + len(part) - 1}/{len(raw)}"
            self.answer(206, part, {"Content-Range": span})
        else:
            self.answer(200, raw)

    def do_HEAD(self) -> None:
        file = self.file()
        self.answer(404 if file is None else 200, b"" if file is None else file.read_bytes())

    def file(self) -> Path | None:
        _, bucket, *key = unquote(urlsplit(self.path).path).split("/")
        file = self.root.joinpath(*key)
        return file if bucket == "films" and file.is_file() else None

    def listed(self, prefix: str) -> bytes:
        files = sorted(path for path in self.root.rglob("*") if path.is_file())
        keys = [key for path in files if (key := path.relative_to(self.root).as_posix()).startswith(prefix)]
        when = "<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>x</ETag>"
        contents = "".join(
            f"<Contents><Key>{key}</Key>{when}<Size>{(self.root / key).stat().st_size}</Size></Contents>"
            for key in keys
        )
        name = f"<Name>films</Name><Prefix>{prefix}</Prefix><KeyCount>{len(keys)}</KeyCount>"
        return f"<ListBucketResult>{name}<IsTruncated>false</IsTruncated>{contents}</ListBucketResult>".encode()

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        common = {"Content-Length": str(len(body)), "ETag": '"x"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        for name, value in (common | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def bucket(dataset, monkeypatch) -> Iterator[str]:
    """The dataset as s3://films/roads."""
    pytest.importorskip("boto3")
    Bucket.root, Bucket.asked = dataset.parent, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    names = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "AWS_DEFAULT_REGION": "eu-west-1"}
    for name, value in (names | {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "secret"}).items():
        monkeypatch.setenv(name, value)
    yield f"s3://films/{dataset.name}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_clips_of_a_profile_are_those_of_the_folder(data_config, train_loader, shelf, num_workers):
    there = data_config(path=shelf, num_workers=num_workers)
    expected = take(train_loader(data_config(num_workers=num_workers)), 8)
    loader = train_loader(there)
    pieces = take(loader, 3)
    resumed = train_loader(there)
    resumed.restore([loader.state()])
    assert equal(pieces + take(resumed, 5), expected)
    assert [video_of(clip) for batch in ValidationLoader(there, rank=0, world_size=1) for clip in batch] == [
        10, 11, 12, 13, 14,
    ]  # fmt: skip


@pytest.mark.parametrize("num_workers", [0, 1])
def test_clips_of_a_bucket_are_those_of_the_folder(data_config, train_loader, bucket, num_workers):
    expected = take(train_loader(data_config(num_workers=num_workers)), 6)
    assert equal(take(train_loader(data_config(path=bucket, num_workers=num_workers)), 6), expected)
    assert any(name.endswith(".tar") for name in Bucket.asked)


def test_blend_of_a_profile_and_a_folder_keeps_to_the_weights(data_config, train_loader, shelf, dataset, tmp_path):
    parts = [{"weight": 3, "path": shelf, "split_part": "train"}, {"weight": 1, "path": str(dataset)}]
    blend = {"__module__": "megatron.energon", "__class__": "MetadatasetV2"}
    splits = {
        "train": {"blend": [parts[0], parts[1] | {"split_part": "val"}]},
        "val": {"path": shelf, "split_part": "val"},
    }
    (tmp_path / "blend.yaml").write_text(yaml.safe_dump(blend | {"splits": splits}))
    config = data_config(path=str(tmp_path / "blend.yaml"), micro_batch_size=10)
    videos = [video_of(clip) for batch in take(train_loader(config), 14) for clip in batch]
    assert sum(video < 10 for video in videos) / len(videos) == pytest.approx(0.75, abs=0.12)
    assert set(videos) == set(range(15))


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("gs://films/roads", "data.path is gs://films/roads, but takes a folder, s3://BUCKET/FOLDER or msc://"),
        ("msc://nowhere/roads", r"msc://nowhere/roads can't be opened as a dataset \(.*\(MSC_CONFIG\)$"),
        ("msc://shelf/empty", r"msc://shelf/empty can't be opened as a dataset \(.*see that it is indexed"),
    ],
)
def test_store_that_does_not_answer_is_refused_in_one_line(data_config, train_loader, shelf, path, complaint):
    with pytest.raises(ConfigError, match=complaint) as error:
        train_loader(data_config(path=path))
    assert "\n" not in str(error.value)


def test_plan_lets_addresses_through_untouched(shelf):
    config = partial(load_experiment, None)
    for path in (shelf, "s3://films/roads"):
        run = resolve(config([f"data.path={path}", "wandb.mode=disabled"]), {})
        assert run.data.path == path
        check_inputs(run)
        check_dataset(path)
        with pytest.raises(ConfigError, match=f"{path} is not counted beforehand: set trainer.max_steps"):
            with_num_steps(resolve(config([f"data.path={path}", "trainer.max_epochs=2"]), {}))
