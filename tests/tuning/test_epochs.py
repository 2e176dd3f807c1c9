"""Each epoch has the same images in another order."""

from __future__ import annotations

import torch
from torch.utils.data import TensorDataset

from ckpt_tools.evaluation.data import Batches, Loading

DATA = TensorDataset(torch.arange(40.0).view(40, 1), torch.arange(40))


def labels(batches: Batches) -> list[int]:
    return [label for _, batch in batches for label in batch.tolist()]


def test_another_order_keeps_the_subset_and_its_batches() -> None:
    batches = Batches(DATA, Loading(images=25, batch_size=8, seed=3))
    first, second, third = labels(batches), labels(batches.reordered(4)), labels(batches.reordered(5))
    assert len(first) == len({*first}) == 25
    assert sorted(first) == sorted(second) == sorted(third)
    assert first != second != third
    assert second == labels(batches.reordered(4))
    assert labels(batches) == first
    assert [len(batch) for _, batch in batches.reordered(4)] == [8, 8, 9]


def test_data_without_a_length_stay_in_their_order() -> None:
    batches = Batches([(torch.zeros(4, 1), torch.arange(4))], Loading(images=-1))
    assert labels(batches.reordered(9)) == [0, 1, 2, 3]
