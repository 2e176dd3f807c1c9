"""How a model is called, and which batches are joined: what reaches it, and what is refused."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ckpt_tools.batchnorm import recalibrate_bn
from ckpt_tools.batchnorm.batches import joined, samples_in
from ckpt_tools.errors import DataError, ModelError, UsageError


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 3


class Taking(nn.Module):
    """Keeps what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3).double()
        self.calls: list[dict[str, Any]] = []

    def forward(self, ids: Tensor, mask: Any = None, labels: Any = None, target: Any = None) -> Tensor:
        self.calls.append({"mask": mask, "labels": labels, "target": target})
        return self.bn(ids)


class Needing(Taking):
    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(ids, labels=labels)


def test_of_a_dict_goes_what_the_forward_has_names_for_but_labels_only_if_it_needs_them() -> None:
    batch = {"ids": values(4, 3), "mask": "m", "labels": "l", "target": "t", "path": "p"}
    model, needing = Taking(), Needing()
    recalibrate_bn(model, [batch])
    recalibrate_bn(nn.DataParallel(needing), [batch])  # its own forward has no names
    assert model.calls == [{"mask": "m", "labels": None, "target": None}]
    assert needing.calls == [{"mask": None, "labels": "l", "target": None}]


def test_of_a_dict_without_what_the_forward_needs_goes_the_entry_of_a_usual_name() -> None:
    model = Taking()
    recalibrate_bn(model, [{"image": values(4, 3), "mask": torch.ones(4, 6, 6), "labels": torch.zeros(4)}])
    assert model.calls == [{"mask": None, "labels": None, "target": None}]


Named = namedtuple("Named", ["ids", "mask"])


def test_leading_entries_of_a_tuple_go_to_the_model() -> None:
    model = Taking()
    recalibrate_bn(model, [Named(values(4, 3), ["m"]), (values(4, 3), ["n"], "rest")], inputs=2)
    recalibrate_bn(model, [({"ids": values(4, 3), "mask": "k"}, "labels")])
    assert [call["mask"] for call in model.calls] == [["m"], ["n"], "k"]


def test_a_function_gets_the_whole_batch_on_the_device_of_the_model() -> None:
    seen: list[Any] = []

    def forward(model: nn.Module, batch: Any) -> None:
        seen.append(batch)
        model(batch["deep"][0][1])

    model = Taking()
    data = values(6, 3)
    recalibrate_bn(model, [{"deep": [(0, data)], "name": "n"}], forward=forward)
    assert seen[0]["name"] == "n"
    np.testing.assert_allclose(model.bn.running_mean.numpy(), data.numpy().mean(0), rtol=1e-12)


class Moving(nn.Module):
    def __init__(self, to: Any) -> None:
        super().__init__()
        self.bn, self.linear, self.place = nn.BatchNorm1d(3), nn.Linear(3, 3), to

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(self.bn(x))
        self.to(self.place)
        return x


@pytest.mark.parametrize(
    ("options", "batch", "error", "message"),
    [
        ({"inputs": 0}, values(4, 3), UsageError, "`inputs=0`: must be a whole number"),
        ({"inputs": 3}, (values(4, 3), 1), DataError, "`inputs=3`: a batch has 2 entries"),
        ({"forward": "net"}, values(4, 3), UsageError, "`forward` is a str, not a function"),
        ({"forward": len, "inputs": 2}, values(4, 3), UsageError, "`inputs` has no effect beside `forward`"),
        ({"forward": lambda model, batch: batch}, values(4, 3), ModelError, "reach none of the BatchNorm layers"),
        ({"forward": lambda model, batch: 1 / 0}, values(4, 3), ZeroDivisionError, "division"),
        ({"mask": "m"}, {"ids": values(4, 3)}, DataError, r"`mask='m'`: a batch \(keys ids\) has no such entry"),
        ({"mask": "1"}, (values(4, 3), torch.ones(4)), DataError, "lengths are integers, not torch.float32"),
        ({"mask": 1}, (values(4, 3), "x"), DataError, r"give a tensor, bool \[N, T\] or lengths"),
    ],
)
def test_bad_calls_are_refused_and_the_model_is_as_before(
    options: dict[str, Any], batch: Any, error: Any, message: str
) -> None:
    model = Taking()
    with pytest.raises(error, match=message):
        recalibrate_bn(model, [batch], **options)
    assert model.bn.running_var.equal(torch.ones(3, dtype=torch.float64))


def test_a_forward_pass_that_moves_the_model_is_refused_and_the_model_comes_back() -> None:
    model = Moving("meta")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match="moves the model from cpu to meta"):
        recalibrate_bn(model, [torch.randn(4, 3)] * 2)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


class Speech(nn.Module):
    """Frames [N, C, T] with padding; the second layer sees pooled values [N, C]."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.bn, self.conv, self.out = nn.BatchNorm1d(3), nn.Conv1d(3, 3, 1, stride), nn.BatchNorm1d(3)
        self.second = nn.BatchNorm1d(3)

    def forward(self, frames: Tensor) -> Tensor:
        return self.out(self.second(self.conv(self.bn(frames))).mean(2))


@pytest.mark.parametrize("as_lengths", [True, False])
def test_padding_is_left_out_by_a_mask(as_lengths: bool) -> None:
    model = Speech().double()
    batches, real, second = [], [], []
    for seed in range(3):
        frames, lengths = values(4, 3, 7, seed=seed), torch.tensor([7, 2, 5, 1])
        mask = torch.arange(7) < lengths[:, None]
        batches.append({"frames": frames, "real": lengths if as_lengths else mask.long()})
        real.append(np.concatenate([frames[i, :, : lengths[i]].numpy() for i in range(4)], axis=1))
        normal = (real[-1] - real[-1].mean(1)[:, None]) / np.sqrt(real[-1].var(1)[:, None] + 1e-5)
        second.append(model.conv.weight[:, :, 0].detach().numpy() @ normal + model.conv.bias.detach().numpy()[:, None])
    report = recalibrate_bn(model, batches, mask="real")
    for layer, columns in ((model.bn, np.concatenate(real, 1)), (model.second, np.concatenate(second, 1))):
        np.testing.assert_allclose(layer.running_mean.numpy(), columns.mean(1), rtol=1e-9)
        np.testing.assert_allclose(layer.running_var.numpy(), columns.var(1, ddof=1), rtol=1e-9)
    assert [layer.count for layer in report.layers] == [45, 12, 45]


@pytest.mark.parametrize("real", [torch.ones(4, 7, dtype=torch.bool), torch.tensor([2, 1, 3, 2])])
def test_a_mask_that_does_not_fit_a_layer_is_refused(real: Tensor) -> None:
    model, batch = Speech(stride=2).double(), {"frames": values(4, 3, 7), "real": real}
    with pytest.raises(DataError, match=r"input of 'second' has the shape \[4, 3, 4\].*`mask` gives (len|pos)"):
        recalibrate_bn(model, [batch], mask="real")


def sizes_of(sizes: list[int], *, enough: bool = False, shape: tuple[int, ...] = (3,)) -> list[int]:
    data = [torch.full((size, *shape), float(i)) for i, size in enumerate(sizes)]
    found = list(joined(data, lambda _: enough))
    assert torch.cat(found).equal(torch.cat(data))  # each sample once, in order
    return [*map(len, found)]


@pytest.mark.parametrize(
    ("sizes", "want"),
    [
        ([4, 4, 1], [4, 5]),
        ([1, 4, 4], [5, 4]),
        ([4, 1, 4], [5, 4]),
        ([1, 1, 7], [2, 7]),
        ([1] * 7, [2, 2, 3]),
        ([2, 2, 1], [2, 3]),
        ([4, 1, 1, 1], [5, 2]),
        ([0, 3, 0], [3]),
    ],
)
def test_batches_of_one_are_joined_no_further_than_needed(sizes: list[int], want: list[int]) -> None:
    assert sizes_of(sizes) == want


def test_batches_of_one_stay_alone_where_one_suffices() -> None:
    assert sizes_of([1] * 5, enough=True) == [1] * 5
    assert sizes_of([4, 4, 1], enough=True) == [4, 5]  # one left over is better with its neighbour


def test_batches_of_any_structure_are_joined_and_others_are_not() -> None:
    one = {"x": (torch.ones(1, 2), [torch.zeros(1, 3)]), "name": "a"}
    (both,) = joined([one, one], lambda _: False)
    assert [*map(list, (both["x"][0].shape, both["x"][1][0].shape))] == [[2, 2], [2, 3]]
    assert both["name"] == "a"
    apart = [one, {**one, "name": "b"}, {**one, "x": (torch.ones(1, 5), [torch.zeros(1, 3)])}]
    assert len(list(joined(apart, lambda _: False))) == 3
    assert samples_in(([torch.ones(3, 2, 2)] * 5, "labels")) == 5


class OneByOne:
    """A loader of batches of one, that counts how many are held at a time."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def __iter__(self) -> Iterator[Tensor]:
        for i in range(30):
            yield values(1, *self.shape, seed=i)


@pytest.mark.parametrize(("shape", "batches"), [((3,), 15), ((3, 4), 30)])
def test_a_loader_of_batches_of_one_is_read_in_pairs_or_one_by_one(shape: tuple[int, ...], batches: int) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3)).double()
    fed: list[int] = []
    report = recalibrate_bn(model, OneByOne(*shape), on_progress=lambda _, images, total: fed.append(images))
    columns = torch.cat([*OneByOne(*shape)]).movedim(1, 0).flatten(1).numpy()
    np.testing.assert_allclose(model[0].running_var.numpy(), columns.var(1, ddof=1), rtol=1e-12)
    assert (report.batches, report.images, max(np.diff(fed))) == (batches, 30, 30 // batches)
