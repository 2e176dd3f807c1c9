"""Kept: the tensors of a model, given back after forward passes that replace or change them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import ModelError

_SMALL = 1 << 20
"""Elements of a buffer up to which its copy is kept in any case: 1 M."""


class Kept:
    """The tensors of a model as they were.

    Parameters and buffers are kept by reference. Of buffers there are copies too, since a forward pass may change them
    in place (observers, codebooks). The copies of large ones that the first batch does not change are dropped.

    Args:
        model: as it is to be again.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places: list[tuple[dict[str, Any], str, Any, Any]] = []
        for module in model.modules():
            if hasattr(module, "_c"):  # TorchScript keeps its own
                continue
            for places in (module._parameters, module._buffers):
                for key, tensor in places.items():
                    self._places.append((places, key, tensor, None if tensor is None else tensor.data))
        self._copies = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
        self._dropped: dict[str, tuple[Tensor, int]] = {}  # with torch's count of changes in place

    def settle(self) -> None:
        """Drop the copies of large buffers that the first batch left as they were."""
        for name, (buffer, copy) in list(self._copies.items()):
            if buffer.numel() > _SMALL and not buffer.is_inference() and _same(buffer, copy):
                del self._copies[name]
                self._dropped[name] = (buffer, buffer._version)

    def put_back(self) -> None:
        """Give the model its tensors back."""
        for places, key, tensor, data in self._places:
            places[key] = tensor
            if type(data) is Tensor and tensor.data_ptr() != data.data_ptr():
                tensor.data = data
        for buffer, copy in self._copies.values():
            if not _same(buffer, copy):
                buffer.copy_(copy)

    def check(self) -> None:
        """Refuse a model that cannot be given back.

        Raises:
            ModelError: a buffer was changed of which there is no copy any more.
        """
        changed = next((name for name, (buffer, version) in self._dropped.items() if buffer._version != version), None)
        if changed is not None:
            raise ModelError(
                f"the forward pass changes the buffer '{changed}' after the first batch, and it is too large to keep a "
                "copy of. Give a model that leaves it alone in eval mode."
            )


def _same(buffer: Tensor, copy: Tensor) -> bool:
    try:
        return buffer.equal(copy)
    except RuntimeError:  # torch compares no values of this dtype
        return False
