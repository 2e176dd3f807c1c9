"""The job: a checkpoint as it came, with a trained classifier, or more, and nothing else changed."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import digits_at
import numpy as np
import pytest
import timm
import torch
from cli_runner import contents
from conftest import Photos, load
from digits_at import digits
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ckpt_tools import TuneReport, open_checkpoint, tune_checkpoint
from ckpt_tools.errors import CkptError, DataError, ModelError, NumericsError, UsageError, WriteError
from digits_net import DigitsNet

Save = Callable[..., Path]
HERE = f"{Path(digits_at.__file__)}"
TRAIN, VAL = f"{HERE}:train12", f"{HERE}:val12"
NET = f"{Path(digits_at.__file__).parents[2]}/fixtures/digits_net.py:DigitsNet"
QUICK: dict[str, Any] = {"model": NET, "data": TRAIN, "batch_size": 50, "workers": 0, "channels_last": False}
BN3 = {f"bn3.{what}" for what in ("running_mean", "running_var", "num_batches_tracked")}
HEAD = {"head.weight", "head.bias"}


@pytest.fixture
def averaged(save: Save) -> Path:
    """A checkpoint of a network that was trained at 8 x 8, with other entries."""
    network = digits_at.trained()
    tree = {
        "epoch": 3,
        "state_dict": {f"module.{name}": each for name, each in network.state_dict().items()},
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(5)}}, "param_groups": [{"lr": 0.1}]},
    }
    return save("averaged.pth", tree)


def tune(path: Path, **options: Any) -> TuneReport:
    return tune_checkpoint(path, **QUICK | options)


def weights(path: Path, out: str = "averaged-tuned.pth") -> dict[str, Tensor]:
    found = load(path.with_name(out))["state_dict"]
    return {name.removeprefix("module."): each for name, each in found.items()}


def changed(path: Path, out: str = "averaged-tuned.pth") -> set[str]:
    before, after = weights(path, path.name), weights(path, out)
    assert list(before) == list(after)
    assert all(before[name].dtype == after[name].dtype for name in before)
    return {name for name in before if not before[name].equal(after[name])}


def order(seed: int = 0) -> list[Tensor]:
    """The batches of the first epoch: the seeded subset that is all images."""
    return [*torch.randperm(300, generator=torch.Generator().manual_seed(seed)).split(50)]


def plainly(network: nn.Module, trained: list[nn.Parameter], lr: float, teacher: nn.Module | None = None) -> None:
    """One epoch of an ordinary loop over the whole network in eval mode, by torch alone."""
    images, labels = digits(12)
    network.eval().requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(trained, lr, 0.9, weight_decay=1e-4)
    for step, batch in enumerate(order()):
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / 6))
        logits = network(images[batch])
        loss = F.cross_entropy(logits, labels[batch])
        if teacher is not None:
            with torch.no_grad():
                target = (teacher(images[batch]) / 5).log_softmax(1)
            student = (logits / 5).log_softmax(1)
            loss = 0.5 * loss + 0.5 * 25 * (target.exp() * (target - student)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def network_of(path: Path) -> DigitsNet:
    network = DigitsNet()
    network.load_state_dict(weights(path, path.name))
    return network


def test_stored_features_give_the_head_of_the_plain_loop_bit_for_bit(averaged: Path) -> None:
    report = tune(averaged, recalibrate="none", epochs=1, lr=0.05)
    assert report.feature_bytes == 300 * 32 * 4
    network = network_of(averaged)
    plainly(network, [*network.head.parameters()], 0.05)
    found = weights(averaged)
    assert found["head.weight"].equal(network.head.weight.detach())
    assert found["head.bias"].equal(network.head.bias.detach())
    assert changed(averaged) == HEAD


def test_stored_logits_of_a_teacher_give_the_head_of_the_plain_loop(averaged: Path) -> None:
    tune(averaged, recalibrate="none", epochs=1, lr=0.05, teacher=f"{HERE}:teacher")
    network = network_of(averaged)
    plainly(network, [*network.head.parameters()], 0.05, digits_at.teacher())
    torch.testing.assert_close(weights(averaged)["head.weight"], network.head.weight.detach(), rtol=1e-5, atol=1e-6)


def test_last_block_without_statistics_is_trained_as_in_a_plain_loop(averaged: Path) -> None:
    report = tune(averaged, train="last-block", recalibrate="none", epochs=1, lr=0.05, teacher=f"{HERE}:teacher")
    assert report.trained == ("conv3", "bn3", "head")
    network = network_of(averaged)
    trained = [*network.conv3.parameters(), *network.bn3.parameters(), *network.head.parameters()]
    plainly(network, trained, 0.05, digits_at.teacher())
    for name in ("conv3.weight", "bn3.weight", "head.bias"):
        torch.testing.assert_close(weights(averaged)[name], network.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert changed(averaged) == HEAD | {"conv3.weight", "bn3.weight", "bn3.bias"}


def test_fixres_helps_at_another_size_and_keeps_every_other_byte(averaged: Path, tmp_path: Path) -> None:
    before, scratch = averaged.read_bytes(), tmp_path / "scratch"
    scratch.mkdir()
    seen: set[str] = set()

    def look(what: Any, done: int, total: int | None) -> None:
        seen.add(what)
        assert total == 300 or what.unit != "images"
        assert not [*scratch.iterdir()]

    report = tune(averaged, eval_data=VAL, lr=0.05, epochs=10, scratch=scratch, on_progress=look, require_gain=True)
    assert averaged.read_bytes() == before
    assert changed(averaged) == HEAD | BN3
    assert report.recalibrated == ("bn3",)
    assert report.head == "head"
    assert report.parameters == 330
    old, new = load(averaged), load(averaged.with_name("averaged-tuned.pth"))
    assert list(old) == list(new)
    assert (new["epoch"], new["optimizer"]["param_groups"]) == (3, [{"lr": 0.1}])
    assert {"evaluating before", "measuring", "computing features", "training, epoch 10 of 10"} <= seen

    # What is reported is what the written weights give, by torch alone.
    images, labels = digits(12)
    assert report.stages is not None
    assert list(report.stages) == ["before", "recalibrated", "after"]
    for stage, out in (("before", "averaged.pth"), ("after", "averaged-tuned.pth")):
        network = DigitsNet().eval()
        network.load_state_dict(weights(averaged, out))
        logits = network(images[300:]).detach().double()
        found = report.stages[stage]
        assert found.images == 300
        assert found.loss == pytest.approx(F.cross_entropy(logits, labels[300:]).item(), rel=1e-6)
        assert found.top1 == pytest.approx(100 * (logits.argmax(1) == labels[300:]).double().mean().item())
    assert [(each.stage, each.other) for each in report.changes] == [
        ("recalibrated", "before"), ("after", "recalibrated"), ("after", "before"),
    ]  # fmt: skip
    loss = next(each for each in report.changes[2].comparisons if each.metric == "loss")
    assert loss.shown
    assert loss.difference == pytest.approx(report.stages["after"].loss - report.stages["before"].loss)
    assert loss.difference < 0
    assert report.verdict[1].startswith("Better than the untuned checkpoint: loss is")
    assert len(report.losses) == 10

    made = open_checkpoint(averaged.with_name("averaged-tuned.pth")).provenance
    assert made is not None
    assert made["command"] == "tune"
    wanted = {"epochs": 10, "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4, "batch_size": 50, "seed": 0}
    assert wanted.items() <= made["arguments"].items()
    assert made["arguments"]["trained"] == ["head"]
    assert made["arguments"]["recalibrated"] == ["bn3"]
    assert made["input"]["name"] == "averaged.pth"


def test_no_difference_is_a_result(averaged: Path) -> None:
    report = tune(averaged, eval_data=VAL, recalibrate="none", epochs=1, lr=1e-9)
    assert report.verdict[0].startswith("No difference from the untuned checkpoint is shown: top1 is")
    assert report.recalibrated == ()
    assert list(report.stages or ()) == ["before", "after"]


def test_the_same_seed_gives_the_same_bytes_whatever_is_trained(averaged: Path) -> None:
    each: list[dict[str, Any]] = [{"train": "head"}, {"train": "all", "ema_decay": 0.5}]
    for options in each:
        options |= {"epochs": 2, "lr": 0.01, "images": 100, "force": True}
        tune(averaged, out=averaged.with_name("1.pth"), **options)
        torch.rand(7)
        tune(averaged, out=averaged.with_name("2.pth"), **options)
        tune(averaged, out=averaged.with_name("3.pth"), seed=4, **options)
        one, two, three = (averaged.with_name(f"{i}.pth").read_bytes() for i in (1, 2, 3))
        assert one.replace(b"1/", b"2/") == two.replace(b"1/", b"2/")
        assert weights(averaged, "1.pth")["head.weight"].ne(weights(averaged, "3.pth")["head.weight"]).any()


def test_training_all_changes_all_and_measures_the_statistics_of_its_weights(averaged: Path) -> None:
    report = tune(averaged, train="all", epochs=2, lr=0.02, eval_data=VAL)
    assert report.trained == ()
    assert report.recalibrated == ("bn1", "bn2", "bn3")
    found = weights(averaged)
    assert changed(averaged) == set(found)
    # The first layer sees convolved images, whatever the batches.
    seen = torch.conv2d(digits(12)[0][:300].double(), found["conv1.weight"].double(), padding=1)
    np.testing.assert_allclose(found["bn1.running_mean"], seen.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["bn1.running_var"], seen.var((0, 2, 3)), rtol=1e-5)
    assert report.losses[1] < report.losses[0]
    assert report.feature_bytes == 0


def test_an_average_of_the_training_lies_between_start_and_end(averaged: Path) -> None:
    for name, decay in (("end", None), ("ema", 0.9)):
        out = averaged.with_name(f"{name}.pth")
        tune(averaged, train="all", epochs=1, lr=0.02, ema_decay=decay, images=150, out=out)
    start, end, ema = (weights(averaged, f"{each}.pth")["conv2.weight"] for each in ("averaged", "end", "ema"))
    assert 0 < (ema - start).norm() < (end - start).norm()


def test_all_layers_are_measured_if_asked(averaged: Path) -> None:
    report = tune(averaged, recalibrate="all", epochs=1)
    assert report.recalibrated == ("bn1", "bn2", "bn3")
    found = weights(averaged)
    assert {name for name in changed(averaged) if not name.startswith("bn")} == HEAD
    seen = torch.conv2d(digits(12)[0][:300].double(), found["conv1.weight"].double(), padding=1)
    np.testing.assert_allclose(found["bn1.running_var"], seen.var((0, 2, 3)), rtol=1e-5)
    assert report.settings["lr"] == pytest.approx(1e-3 * 50 / 512)


def test_safetensors_keep_their_dtypes_and_metadata(tmp_path: Path) -> None:
    state = {k: v.half() if v.is_floating_point() else v for k, v in digits_at.trained().state_dict().items()}
    save_file(state, tmp_path / "a.safetensors", metadata={"note": "mine"})
    tune(tmp_path / "a.safetensors", epochs=1, lr=0.05)
    found = load_file(tmp_path / "a-tuned.safetensors")
    assert {name for name in state if not state[name].equal(found[name])} == HEAD | BN3
    assert all(found[name].dtype == state[name].dtype for name in state)
    with pytest.raises(NumericsError, match=r"the new 'head\.(weight|bias)' is not finite, or overflows float16"):
        tune(tmp_path / "a.safetensors", epochs=1, lr=1e7, batch_size=300, out=tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


def test_a_training_that_the_dtype_of_the_checkpoint_rounds_away_is_told(tmp_path: Path) -> None:
    state = {k: v.bfloat16() if v.is_floating_point() else v for k, v in digits_at.trained().state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    report = tune(tmp_path / "a.safetensors", epochs=1, lr=1e-6)
    found = load_file(tmp_path / "a-tuned.safetensors")
    assert all(found[name].equal(state[name]) for name in HEAD)
    assert report.notes[-1].startswith("The checkpoint is in bfloat16, which is too coarse for what the training chang")
    far = tune(tmp_path / "a.safetensors", epochs=1, lr=0.5, out=tmp_path / "b.safetensors")
    assert not any("too coarse" in note for note in far.notes)


def test_lists_of_batches_are_counted_and_their_order_kept(averaged: Path) -> None:
    report = tune(averaged, data=f"{HERE}:batches12", recalibrate="none", epochs=1, lr=0.05)
    assert report.images == 300
    with mock.patch(f"{__name__}.order", return_value=[*torch.arange(300).split(50)]):
        network = network_of(averaged)
        plainly(network, [*network.head.parameters()], 0.05)
    assert weights(averaged)["head.weight"].equal(network.head.weight.detach())


def test_an_image_that_cannot_be_read_is_left_out_and_told(averaged: Path) -> None:
    report = tune(averaged, data=f"{HERE}:broken12", recalibrate="none", epochs=1, lr=0.05)
    assert report.broken == ("item 7 (OSError: no image)",)
    assert report.notes[-1] == "Images that could not be read and were left out: 1, such as item 7 (OSError: no image)."
    with mock.patch(f"{__name__}.order", return_value=[batch[batch != 7] for batch in order()]):
        network = network_of(averaged)
        plainly(network, [*network.head.parameters()], 0.05)
    assert weights(averaged)["head.weight"].equal(network.head.weight.detach())


@pytest.fixture
def small(save: Save, photos: Photos) -> tuple[Path, dict[str, Any]]:
    """A timm network, and photographs in folders."""
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=3)
    path = save("vit.pth", {"arch": "test_vit", "state_dict": network.state_dict()})
    folder = str(photos(each=2))
    return path, {"data": folder, "eval_data": folder, "batch_size": 4, "workers": 0, "epochs": 2, "lr": 0.01}


def test_folders_have_sizes_of_which_a_refused_one_is_told(small: tuple[Path, dict[str, Any]]) -> None:
    path, options = small
    options["model_kwargs"] = {"dynamic_img_size": False}
    seen: list[Any] = []
    report = tune_checkpoint(
        path,
        sizes=[160, 64],
        on_sizes=seen.append,
        on_progress=lambda what, *_: seen.append(what) if seen else None,
        **options,
    )
    assert seen[0] == report.sizes
    assert any("training" in what for what in seen[1:])
    assert [each.size for each in report.sizes] == [160, 64]
    assert report.sizes[0].accuracy is not None
    assert report.sizes[1].accuracy is None
    assert "failed on a batch of shape [4, 3, 64, 64]" in str(report.sizes[1].error)
    assert any("`eval_data` is the same as `data`" in note for note in report.notes)
    assert any("The model has no BatchNorm statistics" in note for note in report.notes)
    with pytest.raises(ModelError, match=r"failed on a batch of shape \[4, 3, 64, 64\].*`img_size`"):
        tune_checkpoint(path, img_size=64, force=True, **options)


def test_fewer_class_folders_than_outputs_are_told_of_both_sources(
    small: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path, options = small
    one = min(each for each in Path(options["data"]).iterdir() if each.is_dir())
    shutil.copytree(one, tmp_path / "some" / one.name)
    report = tune_checkpoint(path, dry_run=True, **options | {"eval_data": str(tmp_path / "some")})
    assert any(note.startswith("`eval_data` has 1 class folders, and the network 3 outputs") for note in report.notes)
    assert not any(note.startswith("`data` has") for note in report.notes)


def test_augmented_images_are_computed_anew_and_repeat_with_the_seed(small: tuple[Path, dict[str, Any]]) -> None:
    path, options = small
    del options["eval_data"]
    heads = []
    for name, augment in (("plain", False), ("first", True), ("second", True)):
        report = tune_checkpoint(path, augment=augment, out=path.with_name(f"{name}.pth"), **options)
        assert (report.feature_bytes > 0) is not augment
        heads.append(load(path.with_name(f"{name}.pth"))["state_dict"]["head.weight"])
    assert heads[1].equal(heads[2])
    assert not heads[0].equal(heads[1])


def test_a_teacher_with_published_weights_gets_images_in_its_own_normalisation(
    small: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, options = small
    seen: list[Tensor] = []
    create = timm.create_model

    class Seeing(nn.Module):
        pretrained_cfg = {"mean": (0.2, 0.3, 0.4), "std": (0.5, 0.6, 0.7)}

        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return torch.zeros(len(images), 3)

    def made(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
        if name == "resnet18":
            raise OSError("offline")
        return Seeing() if pretrained else create(name, **arguments)

    monkeypatch.setattr(timm, "create_model", made)
    report = tune_checkpoint(path, teacher="test_resnet.r160_in1k", mean=[0.5], std=[0.5], dry_run=True, **options)
    assert any("its own mean (0.2, 0.3, 0.4) and std (0.5, 0.6, 0.7)" in note for note in report.notes)
    taken = seen[0]
    with pytest.raises(ModelError, match=r"its published weights cannot be had \(OSError: offline\)"):
        tune_checkpoint(path, teacher="resnet18", **options)
    tune_checkpoint(path, teacher=f"{HERE}:teacher_of_photos", mean=[0.5], std=[0.5], dry_run=True, **options)
    plain = digits_at.PHOTOS[-1]
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in Seeing.pretrained_cfg.values())
    torch.testing.assert_close(taken, (plain * 0.5 + 0.5 - mean) / std, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_that_teaches_gets_images_in_the_normalisation_of_its_run(
    small: tuple[Path, dict[str, Any]], save: Save
) -> None:
    path, options = small
    torch.manual_seed(1)
    network = timm.create_model("test_efficientnet", num_classes=3)
    tree = {"arch": "test_efficientnet", "state_dict": network.state_dict()}
    own, args = save("own.pth", tree), {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}
    other = save("other.pth", {**tree, "args": args})
    for teacher, told in (
        (path, None),
        (own, "mean (0.485, 0.456, 0.406)"),
        (other, "mean (0.1, 0.2, 0.3) and std (0.5"),
    ):
        report = tune_checkpoint(path, teacher=str(teacher), mean=[0.5], std=[0.4], dry_run=True, **options)
        notes = [note for note in report.notes if note.startswith("The teacher gets the same images with its own")]
        assert len(notes) == (told is not None)
        assert told is None or told in notes[0]


def test_a_checkpoint_teaches_and_its_model_is_that_of_the_student_or_its_own(averaged: Path, save: Save) -> None:
    student = save("student.pth", digits_at.Student().state_dict())
    with pytest.raises(ModelError, match=r"`teacher='.*averaged.pth'`: .*do not fit Student.*right `model`"):
        tune(student, model=f"{HERE}:Student", teacher=str(averaged))
    report = tune(averaged, teacher=str(averaged), alpha=1.0, temperature=1.0, recalibrate="none", epochs=1, lr=1e-6)
    # The student is its own teacher: no divergence at all.
    assert report.losses[0] == pytest.approx(0, abs=1e-6)
    assert report.settings["teacher"] == str(averaged)
    assert report.feature_bytes == 300 * (32 + 10) * 4


def test_a_dry_run_shows_the_plan_and_writes_nothing(averaged: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    plans: list[TuneReport] = []
    report = tune(averaged, dry_run=True, on_plan=plans.append, teacher=f"{HERE}:teacher")
    assert plans == [report]
    assert not report.written
    assert report.feature_bytes == 300 * (32 + 10) * 4
    assert contents(tmp_path) == before


BAD: list[tuple[Mapping[str, Any], type[CkptError], str]] = [
    ({"data": f"{HERE}:eleven"}, DataError, r"`data`: labels from 0 to 10 do not fit a network of 10 classes"),
    ({"eval_data": f"{HERE}:eleven"}, DataError, r"`eval_data`: labels from 0 to 10 do not fit"),
    ({"data": f"{HERE}:unlabelled"}, DataError, "`data` gives a Tensor without labels of its images"),
    ({"data": f"{HERE}:failing"}, DataError, r"`data`.* failed .*the cable is out"),
    ({"data": f"{HERE}:stream12"}, UsageError, "a factory here gives an iterator"),
    ({"teacher": f"{HERE}:nine"}, ModelError, "teacher '.*:nine' has 9 classes, and the network .* has 10"),
    ({"teacher": f"{HERE}:raising"}, ModelError, r"cannot be made \(RuntimeError: no weights\)"),
    ({"teacher": f"{HERE}:text"}, ModelError, "gives a str, not a torch.nn.Module"),
    ({"teacher": f"{HERE}:failing_teacher"}, UsageError, "`teacher=.*has no 'failing_teacher'"),
    ({"teacher": "resnet17"}, UsageError, "`teacher='resnet17'`: is no checkpoint, no timm model"),
    ({"model": f"{HERE}:Doubled"}, ModelError, "output of Doubled is not that of 'head'"),
    ({"model": f"{HERE}:Late"}, ModelError, r"Late failed on a batch of shape \[50, 1, 12, 12\].*out of luck"),
    ({"model": f"{HERE}:Twelve", "data": f"{HERE}:train8"}, ModelError, r"Twelve failed .*a side of 8, not 12"),
    ({"head": "heads"}, UsageError, r"`head='heads'`: DigitsNet has no such module; it has the linear layers head"),
    ({"scratch": "/nowhere"}, WriteError, r"`scratch='/nowhere'`: No such file"),
    ({"lr": 1e30, "epochs": 3}, NumericsError, "the training diverged"),
    ({"lr": 2.0, "recalibrate": "none", "eval_data": VAL, "require_gain": True}, NumericsError, "nothing was written"),
    ({"augment": True}, UsageError, "`augment`: the factory of `data` prepares its images itself"),
    ({"sizes": [8.0], "eval_data": VAL}, UsageError, "`sizes`: the factory of `eval_data`"),
    ({"sizes": [8.5], "eval_data": VAL}, UsageError, r"`sizes=\[8.5\]`: must be whole numbers"),
    ({"sizes": [8]}, UsageError, "`sizes` goes with `eval_data`"),
    ({"require_gain": True}, UsageError, "`require_gain` goes with `eval_data`"),
    ({"train": "some"}, UsageError, "`train` is one of head, last-block, all, not 'some'"),
    ({"train": "all", "head": "head"}, UsageError, "`head` has no effect with `train='all'`"),
    ({"recalibrate": "first"}, UsageError, "`recalibrate` is one of last, all, none, not 'first'"),
    ({"epochs": 0}, UsageError, "`epochs=0`: must be a whole number from 1 on"),
    ({"batch_size": 1}, UsageError, "`batch_size=1`: must be a whole number from 2 on"),
    ({"img_size": 0}, UsageError, "`img_size=0`: must be a whole number from 1 on"),
    ({"images": 1}, UsageError, "`images=1`: must be 2 or more"),
    ({"lr": 0.0}, UsageError, "`lr=0.0`: must be a number above 0"),
    ({"lr": math.nan}, UsageError, "`lr=nan`: must be a number above 0"),
    ({"ema_decay": 1.0}, UsageError, "`ema_decay=1.0`: must be a number from 0 to below 1"),
    ({"alpha": 0.5}, UsageError, "`alpha` goes with `teacher`"),
    ({"temperature": 2.0}, UsageError, "`temperature` goes with `teacher`"),
    ({"alpha": 1.5, "teacher": "x"}, UsageError, "`alpha=1.5`: must be a number from 0 to 1"),
    ({"temperature": 0.0, "teacher": "x"}, UsageError, "`temperature=0.0`: must be a number above 0"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_input_is_refused_and_files_stay_as_they_were(
    averaged: Path, tmp_path: Path, options: Mapping[str, Any], error: type[CkptError], message: str
) -> None:
    digits_at.Late.calls = 0
    before = contents(tmp_path)
    with pytest.raises(error, match=message):
        tune(averaged, **{"scratch": tmp_path, "epochs": 2, **options})
    assert contents(tmp_path) == before


def test_features_that_do_not_fit_the_disk_are_refused_before_any_work(
    averaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    plans: list[TuneReport] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 30_000, 30_000))
    monkeypatch.setattr("ckpt_tools.jobs.tune.job.check_output", lambda *_, **__: None)
    with pytest.raises(WriteError, match=r"the features take 38,400 bytes, and 30,000 are free"):
        tune(averaged, on_plan=plans.append)
    assert not plans
    report = tune(averaged, dry_run=True)
    assert any("The real run would stop" in note for note in report.notes)


def test_weights_that_are_tied_to_others_are_not_trained_on_stored_features(save: Save) -> None:
    network = digits_at.Tied()
    path = save("tied.pth", network.state_dict())
    with pytest.raises(ModelError, match=r"weights of 'head' are those of 'again.weight', too.*`train='all'`"):
        tune(path, model=f"{HERE}:Tied")
    tune(path, model=f"{HERE}:Tied", train="all", epochs=1)
    found = load(path.with_name("tied-tuned.pth"))
    assert found["head.weight"].equal(found["again.weight"])
    assert found["head.weight"].data_ptr() == found["again.weight"].data_ptr()


def test_a_tuning_in_several_processes_is_refused(averaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="runs in one process"):
        tune(averaged)
