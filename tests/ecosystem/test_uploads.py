"""Outputs in a store: what is there, in which order it comes, and what a failure leaves."""

from __future__ import annotations

import json
import re
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cli_runner import run
from safetensors.torch import load_file, save_file

from ckpt_tools import average, fix_prefix, sweep, verify
from ckpt_tools.errors import UsageError, WriteError

boto3 = pytest.importorskip("boto3")
pytest.importorskip("obstore")
pytest.importorskip("moto.server")
BUCKET = "bucket"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    made = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    made.start()
    host, port = made.get_host_and_port()
    yield f"http://{host}:{port}"
    made.stop()


@pytest.fixture
def s3(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client, for an empty bucket; the current folder has three checkpoints of either kind."""
    from ckpt_tools.storage.source import STORES

    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    for name, value in (("ACCESS_KEY_ID", "id"), ("SECRET_ACCESS_KEY", "secret"), ("REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path)
    STORES.pop("s3", None)  # it has seen the bucket of the test before
    client = boto3.client("s3", region_name="us-east-1")
    if BUCKET not in [each["Name"] for each in client.list_buckets()["Buckets"]]:
        client.create_bucket(Bucket=BUCKET)
    for key in keys(client):
        client.delete_object(Bucket=BUCKET, Key=key)
    for i in range(3):
        weights = {name: torch.full((2000,), float(i + n)) for n, name in enumerate("ab")}
        torch.save({"state_dict": weights, "epoch": i}, f"c-{i}.pth")
        Path(f"m-{i}").mkdir()
        save_file(weights, f"m-{i}/model.safetensors")
        Path(f"m-{i}/config.json").write_text('{"model_type": "llama"}')
    yield client
    assert [path.name for path in Path(tempfile.gettempdir()).iterdir() if path.name.startswith(".")] == []


FILES, FOLDERS = (["c-0.pth", "c-1.pth"], ["m-0", "m-1"])


def keys(client: Any) -> list[str]:
    return [each["Key"] for each in client.list_objects_v2(Bucket=BUCKET).get("Contents", [])]


def content(client: Any, key: str) -> bytes:
    data: bytes = client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    return data


def test_a_file_in_a_store_has_the_bytes_of_one_here(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckpt_tools.storage.remote import sending

    monkeypatch.setattr(sending, "_PART", 5 << 20)  # the least that S3 takes
    for i in range(2):
        torch.save({"w": torch.randn(1_500_000)}, f"w-{i}.pth")
    seen: list[tuple[int, int]] = []
    series = ["w-0.pth", "w-1.pth"]
    report = average(
        series, out=f"s3://{BUCKET}/run/avg.pth", on_progress=lambda _, done, total: seen.append((done, total))
    )
    average(series, out="avg.pth")
    assert report.written
    assert report.out == f"s3://{BUCKET}/run/avg.pth"
    assert keys(s3) == ["run/avg.pth"]
    assert content(s3, "run/avg.pth") == Path("avg.pth").read_bytes()
    assert s3.head_object(Bucket=BUCKET, Key="run/avg.pth")["ETag"].endswith('-2"')  # it came in two parts
    assert seen[-1][0] == seen[-1][1] == 3 * 6_000_000 + Path("avg.pth").stat().st_size


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_folder_of_a_megatron_training_has_its_files_in_a_store(s3: Any) -> None:
    for step in (1, 2):
        folder = Path(f"run/iter_{step:07d}")
        dcp.save({"decoder.w": torch.full((3,), float(step)), "decoder.v": torch.ones(2)}, checkpoint_id=folder)
        torch.save({"iteration": step}, folder / "common.pt")
        (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    average(["run"], out="averaged")
    average(["run"], out=f"s3://{BUCKET}/averaged")
    here = {path.as_posix(): path.read_bytes() for path in Path("averaged").rglob("*") if path.is_file()}
    assert {key: content(s3, key) for key in keys(s3)} == here
    assert verify(f"s3://{BUCKET}/averaged", inputs="run").passed


def test_what_is_there_is_replaced_only_if_that_is_asked_for(s3: Any) -> None:
    out = f"s3://{BUCKET}/avg.pth"
    average(FILES, out=out)
    before = content(s3, "avg.pth")
    with pytest.raises(WriteError, match=f"^{out}: exists already. Pass `force=True`"):
        average([*FILES, "c-2.pth"], out=out)
    assert content(s3, "avg.pth") == before
    average([*FILES, "c-2.pth"], out=out, force=True)
    assert content(s3, "avg.pth") != before


def test_the_index_of_a_folder_comes_last_and_an_old_one_goes_first(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckpt_tools.storage.remote import sending

    events: list[str] = []
    send, remove = sending.send, sending.remove

    def sends(path: Path, target: Any, on_bytes: Any) -> None:
        events.append(f"+{target.name}")
        send(path, target, on_bytes)

    def removes(targets: Any) -> None:
        for each in targets:
            events.append(f"-{each.name}")
            remove([each])

    monkeypatch.setattr(sending, "send", sends)
    monkeypatch.setattr(sending, "remove", removes)
    out = f"s3://{BUCKET}/avg/"
    average(FOLDERS, out=out, max_shard_size=8000)
    index = "model.safetensors.index.json"
    assert events[0] == "+config.json"
    assert events[-2:] == [f"+{index}", f"-{sending.CLAIM}"]
    shards = {*json.loads(content(s3, f"avg/{index}"))["weight_map"].values()}
    assert len(shards) == 2
    assert {*keys(s3)} == {f"avg/{name}" for name in (*shards, index, "config.json")}

    events.clear()
    average(FOLDERS, out=out, force=True)
    assert events[:2] == [f"-{index}", "+config.json"]
    assert {*keys(s3)} == {"avg/config.json", "avg/model.safetensors"}
    Path("got.safetensors").write_bytes(content(s3, "avg/model.safetensors"))
    assert torch.equal(load_file("got.safetensors")["a"], torch.full((2000,), 0.5))


@pytest.mark.parametrize("kth", [1, 2, 4])
def test_a_failure_leaves_nothing_there_and_the_output_here(kth: int, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckpt_tools.storage.remote import sending

    put, calls = sending.obstore.put, []

    def fails(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == kth + 1:  # the first is the claim
            raise sending.exceptions.GenericError("Error performing PUT https://secret@host: status code: 503")
        return put(*args, **options)

    monkeypatch.setattr(sending.obstore, "put", fails)
    with pytest.raises(WriteError, match=f"^s3://{BUCKET}/avg/.*: writing failed: ") as refusal:
        average(FOLDERS, out=f"s3://{BUCKET}/avg/", max_shard_size=8000)
    said = "".join(traceback.format_exception(refusal.value))
    assert "secret" not in said
    assert keys(s3) == []
    kept = Path(re.search(r"The output is in (\S+): send it from there", str(refusal.value))[1])  # type: ignore[index]
    average(FOLDERS, out="here/", max_shard_size=8000)
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == {
        path.name: path.read_bytes() for path in Path("here").iterdir()
    }


def test_another_job_for_one_folder_is_noticed_and_what_a_kill_left_is_replaced(s3: Any) -> None:
    from ckpt_tools.storage.remote import as_address, sending

    folder = as_address(f"s3://{BUCKET}/avg")
    assert folder is not None
    sending.claim(folder, ["model.safetensors", "model-00007-of-00009.safetensors"], force=False)
    s3.put_object(Bucket=BUCKET, Key="avg/model-00007-of-00009.safetensors", Body=b"half a model")
    with pytest.raises(WriteError, match="another job sends files to it, or was killed meanwhile"):
        sending.claim(folder, [], force=False)
    with pytest.raises(WriteError, match="exists already"):
        average(FOLDERS, out=str(folder))
    average(FOLDERS, out=str(folder), force=True)
    assert {*keys(s3)} == {"avg/config.json", "avg/model.safetensors"}


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (f"s3://{BUCKET}", WriteError, "there is no name behind the bucket"),
        ("s3://there-is-none/avg.pth", WriteError, "NoSuchBucket"),
        ("hf://org/name/avg.safetensors", WriteError, "nothing is written to hf://.*`hf upload`"),
        ("https://example.org/avg.pth", WriteError, "nothing is written to https://"),
        (f"s3://{BUCKET}/run", WriteError, "also holds notes.txt, and a folder of shards would replace"),
        (f"s3://{BUCKET}/run/notes.txt", WriteError, "is a file already"),
    ],
)
def test_wrong_targets_are_refused(out: str, error: type[Exception], message: str, s3: Any) -> None:
    s3.put_object(Bucket=BUCKET, Key="run/notes.txt", Body=b"mine")
    with pytest.raises(error, match=message):
        average(FOLDERS, out=out, force=True)
    assert keys(s3) == ["run/notes.txt"]


def test_parts_of_a_job_need_a_disk_that_they_share(s3: Any) -> None:
    with pytest.raises(UsageError, match="parts of a job need a disk"):
        average(FILES, out=f"s3://{BUCKET}/avg.pth", part="1/2")
    assert keys(s3) == []


def test_a_mark_of_a_folder_is_no_file_in_it(s3: Any) -> None:
    s3.put_object(Bucket=BUCKET, Key="run/", Body=b"")
    average(FOLDERS, out=f"s3://{BUCKET}/run/", force=True)
    assert "run/model.safetensors" in keys(s3)


def test_credentials_that_expire_during_the_sums_do_not_lose_the_output(
    s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckpt_tools.jobs import uploads
    from ckpt_tools.storage.remote import objects

    check = uploads._check

    def refused(self: Any, path: Path) -> None:
        raise PermissionError(13, "access denied: 400 Bad Request ExpiredToken", str(path))

    def then_expire(*arguments: Any) -> None:
        check(*arguments)
        monkeypatch.setattr(objects.Objects, "_look", refused)

    monkeypatch.setattr(uploads, "_check", then_expire)
    with pytest.raises(WriteError, match=r"ExpiredToken.* The output is in (\S+): send it from there\.") as told:
        average(FILES, out=f"s3://{BUCKET}/avg.pth")
    average(FILES, out="avg.pth")
    kept = re.search(r"The output is in (\S+): send", str(told.value))
    assert kept is not None
    assert Path(kept[1]).read_bytes() == Path("avg.pth").read_bytes()


def test_what_goes_to_local_files_alone_is_refused_in_a_store_before_any_work(s3: Any) -> None:
    for place in (f"s3://{BUCKET}/a", f"https://{BUCKET}/a"):
        for out in ("avg.pth", f"s3://{BUCKET}/avg.pth"):
            with pytest.raises(UsageError, match=f"^`sign_off`: {place}.json is in a store"):
                average(FILES, out=out, sign_off=f"{place}.json")
        for name, suffix in (("plot", ".svg"), ("report", ".html"), ("csv", ".csv")):
            with pytest.raises(UsageError, match=f"^`{name}`: {place}{suffix} is in a store"):
                sweep(FILES, last=[2], eval_command="false", **{name: f"{place}{suffix}"})
        with pytest.raises(UsageError, match=f"^`out`: {place}.pth is in a store"):
            fix_prefix("c-0.pth", add=["module."], out=f"{place}.pth")
    assert keys(s3) == []
    assert not Path("avg.pth").exists()


def test_an_average_in_a_store_is_made_again_and_compared_with_the_new_one(s3: Any) -> None:
    out = f"s3://{BUCKET}/avg.pth"
    average(FILES, out=out)
    for again in ("again.pth", f"s3://{BUCKET}/again.pth"):
        report = average(FILES, replay=out, out=again)
        assert (report.same, report.compared) == (True, f"It is the same as {out} in every byte.")


@pytest.mark.parametrize("files", [FILES, FOLDERS])
def test_an_average_in_a_store_is_made_again_in_its_own_place(files: list[str], s3: Any) -> None:
    out = f"s3://{BUCKET}/avg" + (".pth" if files is FILES else "/")
    average(files, out=out)
    before = {key: content(s3, key) for key in keys(s3)}
    with pytest.raises(WriteError, match="avg(.pth)?: exists already"):
        average(files, replay=out, out=out)
    report = average(files, replay=out, out=out, force=True)
    assert (report.same, report.compared) == (True, f"It is the same as the old {out.rstrip('/')} in every byte.")
    assert {key: content(s3, key) for key in keys(s3)} == before


def test_what_is_sent_is_seen_anew(s3: Any) -> None:
    from ckpt_tools.storage.remote import as_address, sending

    target: Any = as_address(f"s3://{BUCKET}/new/a.bin")
    assert not target.is_file()
    assert not target.parent.is_dir()
    Path("a.bin").write_bytes(b"1234")
    sending.send(Path("a.bin"), target, lambda _: None)
    assert target.is_file()
    assert target.parent.is_dir()


def test_an_error_after_the_upload_says_that_the_output_is_there(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckpt_tools.jobs import sign_off

    def fails(*_: Any, **__: Any) -> None:
        raise WriteError("a.json: cannot be written.")

    monkeypatch.setattr(sign_off, "write_file", fails)
    result = run("avg", *FILES, "-o", f"s3://{BUCKET}/avg.pth", "--sign-off", "a.json")
    assert result.code == 1
    assert f"s3://{BUCKET}/avg.pth is complete" in result.err
    assert keys(s3) == ["avg.pth"]
