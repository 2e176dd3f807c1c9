"""Computed tensors: what was trained or measured, in the dtype that the checkpoint has for it."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..compute.payload import torch_dtype
from ..errors import NumericsError
from ..formats.file_plan import OutTensor, Terms
from ..tensors import DTYPES, DType


def computed(values: Tensor, dtype: DType, shape: tuple[int, ...], name: str, *, advice: str = "") -> OutTensor:
    """Return a tensor of an output that holds values from memory.

    Args:
        values: on any device.
        dtype: of this tensor in the checkpoint. Whole numbers become int64 in any case: other tools average the
            counter of batches, too, and leave it floating point.
        shape: of this tensor in the checkpoint, with as many elements.
        name: of this tensor in the checkpoint.
        advice: ends the message of an error.

    Raises:
        NumericsError: a value is not finite in that dtype.
    """
    written = dtype if values.is_floating_point() else DTYPES["int64"]
    narrow = values.detach().to("cpu", torch_dtype(written)).contiguous()
    if narrow.is_floating_point() and not torch.isfinite(narrow).all():
        raise NumericsError(
            f"the new '{name}' is not finite, or overflows {written.name}, its dtype in the checkpoint.{advice}"
        )
    data = ctypes.string_at(narrow.data_ptr(), narrow.nbytes)  # NumPy is not a dependency
    return OutTensor(written, shape, Terms(), name, data=data)
