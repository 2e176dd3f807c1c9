"""Parts: a model whose weights are in several dicts of a checkpoint, such as an encoder and a decoder.

All parts go into one average: one of them from the last checkpoint alone would make a mixture of two models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ..errors import LayoutError
from ..formats.header import Header
from ..tensors import TensorSpec
from .layouts import StateDict, select
from .layouts.counterparts import is_average
from .layouts.layout import dotted, one_of, read_sets
from .prefixes import unwrap
from .state_dicts import state_dicts


def select_parts(header: Header, asked: Sequence[str]) -> StateDict:
    """Select the weights of a checkpoint, all parts of the model together.

    Args:
        asked: for one part each, what `select` takes; ``auto`` and ``raw`` take the parts beside the weights, too.

    Raises:
        LayoutError: as for `select`; or a part of the model has no average, and another one has.
    """
    chosen = [select(header, state) for state in asked]
    if len(chosen) == 1 and asked[0] in ("auto", "raw"):
        others = [*_beside(header, chosen[0])]
        if chosen[0].which == "ema" and others:
            own, other = dotted(chosen[0].path), dotted(others[0].path)
            raise LayoutError(
                f"{header.path}: '{other}' holds weights, too, and only '{own}' is an average. Use `state='raw'` for "
                f"the raw weights of both, or `state={own!r}` to leave '{other}' as in the last checkpoint."
            )
        chosen += others
    return chosen[0] if len(chosen) == 1 else _joined(header, chosen)


def _beside(header: Header, chosen: StateDict) -> Iterator[StateDict]:
    """Find the other networks, but for averages, in the dict that holds the chosen one.

    A dict is a network if it has a weight or a bias: other tensors, such as the center of a loss, are not of the model.
    """
    above = chosen.path[:-1]
    taken = {chosen.path, *chosen.set_paths}
    for path in state_dicts(header.tree) if chosen.path else ():
        if path[: len(above)] != above or len(path) <= len(above) or is_average(path, chosen.path):
            continue
        if any(path[: len(each)] == each or each[: len(path)] == path for each in taken):
            continue
        each = one_of(read_sets(_at(header, path)), "raw")
        if each is not None and each.fault is None and any(map(_is_weight, each.tensors, each.tensors.values())):
            yield replace(each.below(path), which="raw", home=path, set_paths=(path,))


def _at(header: Header, path: Sequence[object]) -> object:
    node = header.tree
    for key in path:
        node = node[key]
    return node


def _is_weight(name: str, tensor: object) -> bool:
    return isinstance(tensor, TensorSpec) and tensor.dtype.averaged and name.endswith(("weight", "bias"))


def _joined(header: Header, parts: Sequence[StateDict]) -> StateDict:
    tensors = {f"{dotted(part.path)}.{name}": tensor for part in parts for name, tensor in part.tensors.items()}
    which = {part.which for part in parts}
    leads = [f"{dotted(part.path)}." for part in parts]
    if any(a.startswith(b) for a in leads for b in leads if a is not b):
        raise LayoutError(f"{header.path}: {' and '.join(part.label for part in parts)} give one name to two tensors.")
    if "ema" in which and len(which) > 1:
        labels = " and ".join(part.label for part in parts)
        raise LayoutError(
            f"{header.path}: {labels} cannot be mixed. Give `state` for raw or for averaged weights alone."
        )
    return StateDict(
        tensors,
        which=" and ".join(part.label for part in parts),
        layout=parts[0].layout,
        set_paths=tuple(path for part in parts for path in part.set_paths),
        parts=tuple(parts),
    )


def unwrapped(state: StateDict) -> Mapping[str, str]:
    """Map the names of a set to those without wrapper prefixes, which each part has for itself.

    Raises:
        AlignmentError: two names become one.
    """
    if not state.parts:
        return unwrap(state.tensors)
    leads = ((f"{dotted(part.path)}.", part) for part in state.parts)
    return {lead + name: lead + bare for lead, part in leads for name, bare in unwrap(part.tensors).items()}
