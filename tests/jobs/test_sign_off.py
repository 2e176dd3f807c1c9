"""Sign-off: a statement that follows the specifications, of the digests that sha256sum gives, for openssl to sign."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from series_files import sharded
from test_update import series

from ckpt_tools import average, convert, strip, verify
from ckpt_tools.errors import CorruptError, UsageError, WriteError
from ckpt_tools.jobs.sign_off import SignOff


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_resource(resource: Any) -> None:
    """in-toto: a ResourceDescriptor has one of uri, digest and content; a digest is hexadecimal text by algorithm."""
    assert isinstance(resource, dict)
    assert resource.keys() <= {"name", "uri", "digest", "content", "downloadLocation", "mediaType", "annotations"}
    assert resource.keys() & {"uri", "digest", "content"}
    assert isinstance(resource["name"], str)
    assert all(re.fullmatch("[0-9a-f]{64}", each) for each in resource["digest"].values())
    assert resource["digest"].keys() == {"sha256"}


def check_statement(said: Any) -> None:
    """The rules of in-toto Statement v1 and of SLSA provenance v1 for the fields that are used."""
    assert said.keys() == {"_type", "subject", "predicateType", "predicate"}
    assert said["_type"] == "https://in-toto.io/Statement/v1"
    assert said["predicateType"] == "https://slsa.dev/provenance/v1"
    assert said["subject"]
    names = [each["name"] for each in said["subject"]]
    assert len(set(names)) == len(names)
    definition, details = said["predicate"]["buildDefinition"], said["predicate"]["runDetails"]
    assert said["predicate"].keys() == {"buildDefinition", "runDetails"}
    assert definition.keys() == {"buildType", "externalParameters", "internalParameters", "resolvedDependencies"}
    assert isinstance(definition["externalParameters"], dict)
    assert isinstance(definition["internalParameters"], dict)
    for resource in (*said["subject"], *definition["resolvedDependencies"]):
        check_resource(resource)
    assert details.keys() == {"builder", "metadata"}
    for uri in (definition["buildType"], details["builder"]["id"]):
        assert re.match(r"[a-z][a-z0-9+.-]*:", uri)  # RFC 3986: a scheme
    assert all(isinstance(each, str) for each in details["builder"]["version"].values())
    times = [details["metadata"][name] for name in ("startedOn", "finishedOn")]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", each) for each in times)  # RFC 3339
    started, finished = map(datetime.fromisoformat, (each.replace("Z", "+00:00") for each in times))
    assert started <= finished


def digests(resources: Any) -> dict[str, str]:
    return {each["name"]: each["digest"]["sha256"] for each in resources}


def test_a_statement_has_the_digests_of_output_and_inputs(tmp_path: Path) -> None:
    paths = series(tmp_path, 3)
    average(paths, mode="ema", decay=0.5, out=tmp_path / "out.pth", sign_off=tmp_path / "s.json", write_checksums=True)
    said = json.loads((tmp_path / "s.json").read_text())
    check_statement(said)
    assert digests(said["subject"]) == {"out.pth": sha256(tmp_path / "out.pth")}
    definition = said["predicate"]["buildDefinition"]
    assert digests(definition["resolvedDependencies"]) == {path.name: sha256(path) for path in paths}
    invocation = definition["externalParameters"]
    assert (invocation["command"], invocation["arguments"]["decay"]) == ("avg", 0.5)
    assert invocation["inputs"] == [path.name for path in paths]


def test_every_file_of_a_folder_is_a_subject(tmp_path: Path) -> None:
    folders = [sharded(tmp_path / f"step_{i}", float(i)) for i in (1, 2)]
    for name in ("config.json", "tokenizer.json"):
        (folders[-1] / name).write_text(json.dumps({"name": name}))
    average(folders, out=tmp_path / "out", sign_off=tmp_path / "s.json")
    said = json.loads((tmp_path / "s.json").read_text())
    check_statement(said)
    files = [path for path in (tmp_path / "out").iterdir()]
    assert len(files) == 5
    assert digests(said["subject"]) == {f"out/{path.name}": sha256(path) for path in files}
    inputs = {f"{folder.name}/{path.name}": sha256(path) for folder in folders for path in folder.iterdir()}
    assert digests(said["predicate"]["buildDefinition"]["resolvedDependencies"]) == inputs


def test_a_companion_that_changes_before_it_is_copied_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, begun = sharded(tmp_path / "step_1", 1.0), SignOff.begun
    (folder / "config.json").write_text("{}")

    def then_changed(*args: Any) -> Any:
        statement = begun(*args)
        (folder / "config.json").write_text('{"other": true}')
        return statement

    monkeypatch.setattr(SignOff, "begun", then_changed)
    with pytest.raises(CorruptError, match=r"config\.json: changed while it was read"):
        average([folder], out=tmp_path / "out", sign_off=tmp_path / "s.json")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "s.json").exists()


def test_the_digests_of_a_folder_are_a_list_for_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [sharded(tmp_path / f"step_{i}", float(i)) for i in (1, 2)]
    (folders[-1] / "tokenizer.json").write_text("{}")
    (folders[-1] / "config.json").write_text("{}")
    average(folders, out="averaged", sign_off="averaged.json")
    subjects = json.loads(Path("averaged.json").read_text())["subject"]
    lines = [f"{each['digest']['sha256']}  {each['name']}\n" for each in subjects]  # as jq writes them
    Path("averaged.sha256").write_text("".join(lines))
    assert verify("averaged", expect_sha256="averaged.sha256").passed
    Path("averaged/tokenizer.json").write_text("{ }")
    assert not verify("averaged", expect_sha256="averaged.sha256").passed


def test_copies_of_one_file_have_statements_too(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(3)}, "optimizer": {"state": {}, "param_groups": []}}, tmp_path / "a.pth")
    for make, out in ((convert, "b.pth"), (strip, "c.pth")):
        make(tmp_path / "a.pth", out=tmp_path / out, sign_off=tmp_path / f"{out}.json")
        said = json.loads((tmp_path / f"{out}.json").read_text())
        check_statement(said)
        assert digests(said["subject"]) == {out: sha256(tmp_path / out)}


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_openssl_signs_a_statement(tmp_path: Path) -> None:
    average(series(tmp_path, 2), out=tmp_path / "out.pth", sign_off=tmp_path / "s.json")

    def openssl(*words: str) -> int:
        return subprocess.run(["openssl", *words], cwd=tmp_path, capture_output=True, check=False).returncode

    assert openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "key.pem") == 0
    assert openssl("ec", "-in", "key.pem", "-pubout", "-out", "key.pub") == 0
    assert openssl("dgst", "-sha256", "-sign", "key.pem", "-out", "s.sig", "s.json") == 0
    verified = ("dgst", "-sha256", "-verify", "key.pub", "-signature", "s.sig", "s.json")
    assert openssl(*verified) == 0
    (tmp_path / "s.json").write_text((tmp_path / "s.json").read_text().replace("avg", "AVG"))
    assert openssl(*verified) != 0


def test_a_statement_is_refused_before_the_work_where_it_cannot_be(tmp_path: Path) -> None:
    paths = series(tmp_path, 2)
    (tmp_path / "there.json").write_text("mine")
    out = tmp_path / "out.pth"
    with pytest.raises(WriteError, match=r"there.json: exists already.*another name with `sign_off`"):
        average(paths, out=out, sign_off=tmp_path / "there.json")
    with pytest.raises(UsageError, match="in the place of the output"):
        average(paths, out=out, sign_off=out, force=True)
    with pytest.raises(UsageError, match="or inside it"):
        average(paths, out=tmp_path / "folder", sign_off=tmp_path / "folder/s.json")
    with pytest.raises(WriteError, match="is one of the inputs"):
        average(paths, out=out, sign_off=paths[0], force=True)
    with pytest.raises(WriteError, match="there is no folder"):
        average(paths, out=out, sign_off=tmp_path / "none/s.json")
    assert not out.exists()
    assert (tmp_path / "there.json").read_text() == "mine"
    average(paths, out=out, sign_off=tmp_path / "there.json", force=True)
    check_statement(json.loads((tmp_path / "there.json").read_text()))


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_what_an_input_says_of_itself_is_in_the_statement_only_as_strict_json(number: str, tmp_path: Path) -> None:
    for name, said in (("odd", f'{{"x": [{{"y": {number}}}]}}'), ("plain", '{"x": [{"y": 1e99}]}')):
        path, statement = tmp_path / f"{name}.safetensors", tmp_path / f"{name}.json"
        save_file({"w": torch.ones(2)}, path, metadata={"ckpt_tools": said})
        convert(path, out=tmp_path / f"{name}.pth", sign_off=statement)
        text = statement.read_text()
        found = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
        check_statement(found)
        made = found["predicate"]["buildDefinition"]["internalParameters"]["input"]["made"]
        assert made == (None if name == "odd" else {"x": [{"y": 1e99}]})


def test_a_statement_that_fails_at_last_says_that_the_output_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckpt_tools.jobs import sign_off

    def full(*_: Any, **__: Any) -> None:
        raise WriteError("s.json: cannot be written (No space left on device).")

    monkeypatch.setattr(sign_off, "write_file", full)
    with pytest.raises(WriteError, match=r"out.pth is complete, but its sign-off is not written: .*No space left"):
        average(series(tmp_path, 2), out=tmp_path / "out.pth", sign_off=tmp_path / "s.json")
    assert (tmp_path / "out.pth").exists()
    assert not (tmp_path / "s.json").exists()
