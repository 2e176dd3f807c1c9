"""Remote inputs: moto's S3, a server of ranges that fails, and a stub of the Hub, all on this machine."""

from __future__ import annotations

import _thread
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import torch
from cli_runner import environment, run
from hub_server import HubStub, a_hub
from range_server import Asked, RangeServer, serving
from safetensors.torch import load_file, save_file

from ckpt_tools import average, convert, diff, open_checkpoint, sweep
from ckpt_tools.errors import CkptError, CorruptError, ReadError, SeriesError, UsageError
from ckpt_tools.storage import ahead
from ckpt_tools.storage.remote import Address, as_address, objects
from ckpt_tools.storage.source import STORES, store_of

STEPS = (100, 200, 1000)
SECRETS = ("secret", "hf_token")


def weights(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {f"layers.{i}.w": torch.randn(1024, 128 * 12, generator=generator) for i in range(1)} | {
        f"layers.{i}.b": torch.randn(64, generator=generator) for i in range(8)
    }


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A series in each form: files of torch, safetensors, folders of shards."""
    root = tmp_path_factory.mktemp("runs")
    for step in STEPS:
        torch.save({"model": weights(step), "step": step}, root / f"step_{step}.pth")
        save_file(weights(step), root / f"step_{step}.safetensors")
        shards = root / f"checkpoint-{step}"
        convert(root / f"step_{step}.safetensors", out=f"{shards}/", max_shard_size="6MB")
        (shards / "config.json").write_text(json.dumps({"model_type": "toy", "architectures": ["Toy"]}))
    return root


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No long pauses between tries, blocks of 1 MB, stores made anew."""
    monkeypatch.setattr(objects, "PAUSE", 0.01)
    monkeypatch.setitem(objects._RETRIES, "max_retries", 2)
    monkeypatch.setitem(
        objects._RETRIES, "backoff", dict.fromkeys(("init_backoff", "max_backoff"), _MOMENT) | {"base": 2}
    )
    monkeypatch.setattr(ahead, "BLOCK", 1 << 20)
    for scheme in ("s3", "gs", "az", "http", "https", "hf"):
        monkeypatch.delitem(STORES, scheme, raising=False)
    objects.QUERIES.clear()


_MOMENT = objects.timedelta(milliseconds=5)


@pytest.fixture
def server(runs: Path) -> Iterator[RangeServer]:
    with serving(runs) as started:
        yield started


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    started = ThreadedMotoServer(port=0, verbose=False)
    started.start()
    host, port = started.get_host_and_port()
    yield f"http://{host}:{port}"
    started.stop()


@pytest.fixture(scope="session")
def uploaded(moto: str, runs: Path) -> str:
    """The series in a bucket of moto's, put there by boto3."""
    import boto3

    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "secret"}
    client = boto3.client("s3", region_name="us-east-1", endpoint_url=moto, **keys)
    client.create_bucket(Bucket="runs")
    for path in runs.rglob("*"):
        if path.is_file():
            client.put_object(Bucket="runs", Key=f"a run/{path.relative_to(runs)}", Body=path.read_bytes())
    return "s3://runs/a run"


@pytest.fixture
def bucket(moto: str, uploaded: str, monkeypatch: pytest.MonkeyPatch) -> str:
    credentials(monkeypatch, moto)
    return uploaded


def credentials(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


def same_as_local(remote: list[str], local: list[Path], tmp_path: Path, **options: Any) -> None:
    folder = local[0].is_dir()
    out = [tmp_path / f"{name}{'' if folder else local[0].suffix}" for name in ("local", "remote")]
    average(local, out=out[0], **options)
    report = average(remote, out=out[1], **options)
    assert [each.name for each in report.inputs] == [path.name for path in local]
    files = [path.relative_to(out[0]) for path in out[0].rglob("*")] if folder else [Path()]
    assert files
    for name in files:
        assert (out[1] / name).read_bytes() == (out[0] / name).read_bytes(), name


@pytest.mark.parametrize("name", ["step_*.pth", "step_*.safetensors", "checkpoint-*/"])
def test_a_series_in_a_bucket_gives_the_bytes_of_the_local_one(
    name: str, bucket: str, runs: Path, tmp_path: Path
) -> None:
    local = sorted(runs.glob(name.rstrip("/")), key=lambda path: int(re.sub(r"\D", "", path.name)))
    same_as_local([f"{bucket}/{name}"], local, tmp_path)


def test_names_in_a_bucket_are_those_that_s3fs_finds(bucket: str, moto: str) -> None:
    import s3fs

    theirs = s3fs.S3FileSystem(endpoint_url=moto, skip_instance_cache=True)
    store = store_of(as_address(f"{bucket}/x") or Path())
    for pattern in ("*", "step_*", "checkpoint-*/config.json", "**/model-00001*", "step_1?0.pth", "nothing*"):
        found = [str(path).removeprefix("s3://") for path in store.find(Address(f"{bucket}/{pattern}"))]
        assert found == sorted(theirs.glob(f"runs/a run/{pattern}")), pattern


def test_other_commands_read_addresses_too(bucket: str, runs: Path, tmp_path: Path) -> None:
    remote = f"{bucket}/step_100.pth"
    shown = run("inspect", remote)
    assert shown.code == 0
    assert "s3://runs/a run/step_100.pth: torch-zip" in shown.out
    assert diff(remote, runs / "step_100.safetensors").verdict == "identical"
    assert torch.equal(open_checkpoint(remote)["layers.3.b"], weights(100)["layers.3.b"])
    convert(remote, out=tmp_path / "out.safetensors")
    assert torch.equal(load_file(tmp_path / "out.safetensors")["layers.0.w"], weights(100)["layers.0.w"])


def dcp_folder(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """As a training with FSDP saves its model and optimizer."""
    import torch.distributed.checkpoint as dcp

    slots = {f"optimizer.state.{name}.exp_avg": tensor / 3 for name, tensor in tensors.items()}
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"model": tensors, **slots}, checkpoint_id=folder)


def megatron_folder(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """As megatron-core saves an iteration, in one process."""
    import torch.distributed.checkpoint as dcp

    slots = {f"optimizer.state.exp_avg.{name}": tensor / 3 for name, tensor in tensors.items()}
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(tensors | slots, checkpoint_id=folder)
    step = int(re.sub(r"\D", "", folder.name))
    torch.save({"iteration": step, "checkpoint_version": 3.0}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))


@pytest.mark.parametrize(("make", "state"), [(dcp_folder, "model"), (megatron_folder, None)])
def test_folders_of_dcp_are_shown_averaged_and_converted_as_local_ones(
    make: Callable[[Path, dict[str, torch.Tensor]], None],
    state: str | None,
    moto: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    import boto3

    credentials(monkeypatch, moto)
    root, bucket = tmp_path / "run", make.__name__.replace("_", "-")
    client = boto3.client("s3", endpoint_url=moto)
    client.create_bucket(Bucket=bucket)
    for step in STEPS[:2]:
        make(root / f"iter_{step:07d}", weights(step))
    for path in root.rglob("*"):
        if path.is_file():
            client.put_object(Bucket=bucket, Key=f"run/{path.relative_to(root)}", Body=path.read_bytes())
    first, more = "iter_0000100", {} if state is None else {"state": state}

    shown = [run("inspect", f"{where}/{first}", "--json").out for where in (root, f"s3://{bucket}/run")]
    assert shown[1].replace(f"s3://{bucket}/run", str(root)) == shown[0] != ""
    for where, source in (("local", f"{root}"), ("remote", f"s3://{bucket}/run")):
        (tmp_path / where).mkdir()
        average([f"{source}/iter_*"], out=tmp_path / where / "averaged", **more)
        convert(f"{source}/{first}", out=tmp_path / where / "one.safetensors", to="plain", **more)
    made = [
        {
            path.relative_to(tmp_path / where): path.read_bytes()
            for path in (tmp_path / where).rglob("*.*")
            if path.is_file()
        }
        for where in ("local", "remote")
    ]
    assert made[0] == made[1]
    assert torch.equal(load_file(tmp_path / "remote" / "one.safetensors")["layers.0.w"], weights(100)["layers.0.w"])


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://runs/a run/step_7.pth", r"s3://runs/a run/step_7\.pth: no such file or folder"),
        ("s3://runs/a run/nothing*", r"no file matches 's3://runs/a run/nothing\*'"),
        ("s3://no-such-bucket/a.pth", r"s3://no-such-bucket/a\.pth: "),
    ],
)
def test_what_is_not_in_a_bucket_is_said_by_its_whole_address(
    bucket: str, address: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CkptError, match=message):
        average([address], out=tmp_path / "out.pth")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_plan_costs_less_than_a_thousandth_of_the_bytes(
    suffix: str, server: RangeServer, runs: Path, tmp_path: Path
) -> None:
    urls = [f"{server.url}/step_{step}.{suffix}" for step in STEPS]
    average(urls, out=tmp_path / f"out.{suffix}", dry_run=True)
    total = sum((runs / f"step_{step}.{suffix}").stat().st_size for step in STEPS)
    assert 0 < server.sent < total / 1000

    server.requests.clear()
    average(urls, out=tmp_path / f"out.{suffix}")
    payload = sum(tensor.nbytes for tensor in weights(100).values()) * len(STEPS)
    assert payload <= server.sent < payload * 1.003


class Once:
    """A fault in the first answer to each range that is large."""

    def __init__(self, fault: int | str) -> None:
        self.fault, self.seen = fault, set[tuple[str, int]]()

    def __call__(self, asked: Asked) -> int | str | None:
        first = (asked.path, asked.begin) not in self.seen and asked.begin > 512
        self.seen.add((asked.path, asked.begin))
        return self.fault if first else None


@pytest.mark.parametrize("fault", [500, 503, 429, "cut", "short"])
def test_what_fails_once_is_asked_for_again(fault: int | str, server: RangeServer, runs: Path, tmp_path: Path) -> None:
    server.fault = once = Once(fault)
    urls = [f"{server.url}/step_{step}.safetensors" for step in STEPS]
    same_as_local(urls, [runs / f"step_{step}.safetensors" for step in STEPS], tmp_path)
    assert len(once.seen) > 20


def refused(error: type[Exception], match: str, urls: list[str], folder: Path, **options: Any) -> None:
    """Check that a job is refused, that it leaves nothing, and that no secret is in what it says."""
    folder.mkdir()
    with pytest.raises(error, match=match) as told:
        average(urls, out=folder / "out.safetensors", **options)
    assert [*folder.iterdir()] == []
    said = "".join(traceback.format_exception(told.value))
    assert not any(secret in said for secret in SECRETS), said


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (500, r"step_200\.safetensors: reading failed \(the server answered 500 Internal Server Error; 4 tries\)"),
        (503, r"the server answered 503 Service Unavailable SlowDown; 4 tries"),
        ("cut", r"the transfer broke off; 4 tries"),
        ("short", r"the server sent fewer bytes than were asked for; 4 tries"),
        (403, r"reading failed \(access denied: 403 Forbidden; the credentials may be wrong, or have expired\)\."),
    ],
)
def test_what_always_fails_ends_the_job_and_shows_no_signature(
    fault: int | str, message: str, server: RangeServer, tmp_path: Path
) -> None:
    server.fault = lambda asked: fault if asked.path.startswith("/step_200") and asked.begin > 1 << 20 else None
    urls = [f"{server.url}/step_{step}.safetensors?Signature=secret" for step in STEPS]
    refused(ReadError, message, urls, tmp_path / "out")


@pytest.mark.parametrize("tagged", [True, False])
def test_a_file_that_changes_midway_is_refused(tagged: bool, server: RangeServer, runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    folder.mkdir()
    server.folder = folder
    for step in STEPS:
        shutil.copy(runs / f"step_{step}.safetensors", folder)
        if not tagged:
            server.tags[f"/step_{step}.safetensors"] = None
    changed = folder / "step_200.safetensors"

    def change(asked: Asked) -> None:
        if asked.path == "/step_200.safetensors" and asked.begin > 1 << 20 and changed.stat().st_mtime > 1e9:
            os.utime(changed, (1e8, 1e8))

    server.fault = change
    urls = [f"{server.url}/step_{step}.safetensors" for step in STEPS]
    refused(CorruptError, r"step_200\.safetensors: changed while it was read", urls, tmp_path / "out")


def test_a_signed_address_is_asked_for_with_its_signature_and_recorded_without(
    server: RangeServer, runs: Path, tmp_path: Path
) -> None:
    asked: list[str] = []

    def check(handler: Any) -> bool:
        asked.append(handler.path)
        if handler.path.endswith("?X-Amz-Signature=secret%2Fsigned&b=1"):
            return False
        handler.answer(403, {})
        return True

    server.answer = check
    urls = [f"{server.url}/step_{step}.safetensors?X-Amz-Signature=secret%2Fsigned&b=1" for step in STEPS]
    out = tmp_path / "out.safetensors"
    report = average(urls, out=out, hash=True)
    assert asked
    assert "secret" not in json.dumps(report.to_dict())
    assert b"secret" not in out.read_bytes()
    with pytest.raises(UsageError, match=r"http://\.\.\.@host/a\.pth: an address with a password") as told:
        average(["http://user:secret@host/a.pth"], out=out)
    assert "secret" not in str(told.value)
    for given in (f"{server.url}/missing.pth?secret", f"{server.url}/missing*.pth?secret", "ftp://h/a.pth?x"):
        with pytest.raises(SeriesError) as wrong:
            average([given], out=out, force=True)
        assert "secret" not in str(wrong.value)
        assert "The folder" not in str(wrong.value)
    with pytest.raises(SeriesError, match=f"^{server.url}/step_100.safetensors: given with several queries"):
        diff(urls[0], f"{server.url}/step_100.safetensors?secret")
    for name in ("a.pht", ".pth"):
        with pytest.raises(UsageError) as slip:
            average(urls, out=f"{server.url}/{name}?secret")
        assert "secret" not in str(slip.value)
    found = sweep(urls, last=[2], eval_command="false", dry_run=True)
    assert "secret" not in json.dumps(found.to_dict())


@pytest.mark.parametrize(
    ("whole", "url", "error", "match"),
    [
        (True, "step_100.pth", SeriesError, "the server sends whole files only"),
        (False, "missing.pth", SeriesError, r"http://.*/missing\.pth: no such file"),
    ],
)
def test_a_server_without_ranges_and_a_file_that_is_not_there_are_refused(
    whole: bool, url: str, error: type[Exception], match: str, server: RangeServer, tmp_path: Path
) -> None:
    server.whole = whole
    refused(error, match, [f"{server.url}/{url}"], tmp_path / "out")


def test_a_server_that_does_not_answer_is_refused(server: RangeServer, tmp_path: Path) -> None:
    refused(SeriesError, "no connection to the server", ["http://127.0.0.1:9/a.pth"], tmp_path / "out")


def listing(keys: list[str]) -> Callable[[Any], bool]:
    """Answer as an S3 that lists these objects, and serves none, since the token has expired."""

    def answer(handler: Any) -> bool:
        query = parse_qs(urlsplit(handler.path).query)
        if "list-type" in query:
            prefix = query.get("prefix", [""])[0]
            own = [key for key in keys if key.startswith(prefix)]
            objects_ = "".join(
                f"<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                f'<ETag>"1"</ETag><Size>5000</Size></Contents>'
                for key in own
            )
            body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{objects_}</ListBucketResult>"
            handler.answer(200, {"Content-Type": "application/xml"}, body.encode())
        else:
            handler.answer(400, {}, b"<Error><Code>ExpiredToken</Code><Message>secret token</Message></Error>")
        return True

    return answer


def test_a_store_that_lists_but_does_not_serve_is_refused_with_its_reason(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials(monkeypatch, server.url)
    server.answer = listing([f"r/step_{step}.pth" for step in STEPS])
    message = r"s3://bucket/r/step_100\.pth: .*access denied: 400 Bad Request ExpiredToken; the credentials may be"
    refused(ReadError, message, ["s3://bucket/r/step_*.pth"], tmp_path / "out")


def test_a_glob_that_matches_too_much_is_refused(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials(monkeypatch, server.url)
    server.answer = listing([f"r/step_{step}.pth" for step in range(10_001)])
    message = r"'s3://bucket/r/step_\*' matches more than 10,000 objects\. Write a narrower one"
    refused(SeriesError, message, ["s3://bucket/r/step_*"], tmp_path / "out")


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_other_providers_are_asked_through_their_own_clients(
    scheme: str, server: RangeServer, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def client(bucket: str) -> Any:
        made.append(bucket)
        return objects.at_url(f"{server.url}/x").client

    monkeypatch.setitem(objects.BUCKETS, scheme, client)
    store = store_of(as_address(f"{scheme}://bucket/step_100.pth") or Path())
    assert store.is_file(Address(f"{scheme}://bucket/step_100.pth"))
    assert made == ["bucket"]
    with closing(store.open(Address(f"{scheme}://bucket/step_100.pth"))) as file:
        assert file.stat()[0] == (runs / "step_100.pth").stat().st_size


@pytest.fixture
def hub(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    """A model whose revisions are steps, as OLMo's and Pythia's are."""
    from huggingface_hub import constants

    for step in STEPS:
        shutil.copytree(runs / f"checkpoint-{step}", tmp_path / "hub" / "cdn" / f"step{step}")
    shutil.copytree(runs / "checkpoint-1000", tmp_path / "hub" / "cdn" / "main")
    with a_hub(tmp_path / "hub") as stub:
        monkeypatch.setattr(constants, "ENDPOINT", stub.server.url)
        url = stub.server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_token")
        yield stub


def test_revisions_of_a_model_are_a_series(hub: HubStub, runs: Path, tmp_path: Path) -> None:
    remote = ["hf://org/name@step*/"]
    average([runs / f"checkpoint-{step}" for step in STEPS], out=tmp_path / "local")
    report = average(remote, out=tmp_path / "remote")
    assert [(each.name, each.step) for each in report.inputs] == [(f"name@step{step}", step) for step in STEPS]
    for path in (tmp_path / "local").iterdir():
        if path.suffix == ".safetensors":
            theirs = load_file(tmp_path / "remote" / path.name)
            assert all(torch.equal(tensor, theirs[name]) for name, tensor in load_file(path).items())
    assert (tmp_path / "remote" / "config.json").exists()


def test_names_and_bytes_of_a_model_are_those_of_the_hubs_own_file_system(hub: HubStub) -> None:
    from huggingface_hub import HfFileSystem

    theirs = HfFileSystem(endpoint=hub.server.url, token="hf_token", skip_instance_cache=True)
    top = as_address("hf://org/name@step200")
    assert top is not None
    store = store_of(top)
    found = {f"{top}/{path}": size for path, size in files_below(store, top)}
    assert found == {f"hf://{name}": info["size"] for name, info in theirs.find(str(top), detail=True).items()}
    assert len(found) == 5
    for address in found:
        with theirs.open(address) as file, closing(store.open(as_address(address))) as ours:
            size = found[address]
            data = bytearray(size)
            assert ours.read_into(0, memoryview(data)) == size
            assert bytes(data) == file.read()
    assert store.find(Address("hf://org/name@step?00/*.json")) == [
        Address(f"hf://org/name@step{step}/{name}")
        for step in (100, 200)
        for name in ("config.json", "model.safetensors.index.json")
    ]


def test_a_signature_that_expires_midway_is_renewed(hub: HubStub, runs: Path, tmp_path: Path) -> None:
    def expire(asked: Asked) -> None:
        if asked.begin > 1 << 20 and hub.signature == "first-secret":
            hub.signature = "second-secret"

    hub.server.fault = expire
    average([runs / f"checkpoint-{step}" for step in STEPS], out=tmp_path / "local.safetensors")
    average(["hf://org/name@step*"], out=tmp_path / "remote.safetensors")
    assert hub.signature == "second-secret"
    ours, theirs = (load_file(tmp_path / f"{name}.safetensors") for name in ("remote", "local"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize(
    ("address", "token", "match"),
    [
        ("hf://org/name@step300", None, r"hf://org/name@step300: .* no revision step300\. Did you mean .*@step"),
        ("hf://org/other", None, "hf://org/other.*: no such model, or it is private. Set HF_TOKEN"),
        ("hf://org/name@step*", "another", "no such model, or it is private. Set HF_TOKEN"),
        ("hf://org/name@never*", None, r"no file matches 'hf://org/name@never\*'"),
        ("hf://org", None, "hf://org: no such file or folder|write hf://org/name"),
        ("hf://org/name@main/missing.pth", None, r"hf://org/name@main/missing\.pth: no such file"),
    ],
)
def test_what_is_not_on_the_hub_is_refused(
    address: str, token: str | None, match: str, hub: HubStub, tmp_path: Path
) -> None:
    hub.token = token
    refused(SeriesError, match, [address], tmp_path / "out")


def files_below(store: Any, folder: Address) -> Iterator[tuple[Path, int]]:
    for name in store.names(folder):
        path = folder / name
        if store.is_folder(path):
            yield from ((Path(name) / inner, size) for inner, size in files_below(store, path))
        else:
            yield Path(name), store.open(path).stat()[0]


def test_a_copy_under_another_name_costs_a_plan_a_few_bytes_of_each_tensor(
    server: RangeServer, runs: Path, tmp_path: Path
) -> None:
    server.folder = tmp_path
    for step in STEPS:
        shutil.copy(runs / f"step_{step}.safetensors", tmp_path)
    shutil.copy(runs / "step_1000.safetensors", tmp_path / "last.safetensors")
    urls = [f"{server.url}/{name}.safetensors" for name in (*(f"step_{step}" for step in STEPS), "last")]
    report = average(urls, out=tmp_path / "out.safetensors", dry_run=True)
    assert len(report.inputs) == 3
    assert f"{urls[3]} is {urls[2]} again, as 64 bytes of each tensor say: counted once." in report.notes
    assert server.sent < sum(path.stat().st_size for path in tmp_path.iterdir()) / 1000


def test_a_signal_ends_the_wait_for_a_request_that_is_not_answered() -> None:
    answer = threading.Event()
    interrupt = threading.Timer(0.2, _thread.interrupt_main)
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        objects.asked(answer.wait, 60)
    assert "ckpt-request" in [thread.name for thread in threading.enumerate()]  # and nobody waits for it
    answer.set()


@pytest.mark.parametrize("silent", ["header", "payload"])
def test_a_command_ends_at_ctrl_c_though_the_server_says_nothing(
    silent: str, server: RangeServer, tmp_path: Path
) -> None:
    asked, goes_on = threading.Event(), threading.Event()

    def hang(request: Asked) -> None:
        begin, end = re.findall(
            r"\d+", next(value for name, value in request.headers.items() if name.lower() == "range")
        )
        if silent == "header" or int(end) - int(begin) > 100_000:
            asked.set()
            goes_on.wait(120)

    server.fault = hang
    words = [f"{server.url}/step_100.safetensors", f"{server.url}/step_200.safetensors", "-o", "out.safetensors"]
    command = [sys.executable, "-m", "ckpt_tools", "avg", *words]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    assert asked.wait(120)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    goes_on.set()
    # While headers are read the signal itself ends the process, which shells tell as 130, too.
    assert process.returncode == (130 if silent == "payload" else -signal.SIGINT), err
    assert "Traceback" not in err
    assert [*tmp_path.iterdir()] == []
