"""Parts: a model whose weights are in several dicts of a checkpoint, such as an encoder and a decoder.

All parts go into one average: one of them from the last checkpoint alone would make a mixture of two models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ..errors import LayoutError
from ..formats.header import Header
from ..formats.tree import Path
from ..formats.tree import holds as in_dicts
from ..tensors import TensorSpec
from .layouts import StateDict, select, states
from .layouts.counterparts import are_twins, is_average
from .layouts.layout import dotted, one_of, read_sets, set_keys
from .layouts.schedule_free import evaluated
from .prefixes import unwrap
from .state_dicts import state_dicts
from .training_state import leads


def select_parts(header: Header, asked: Sequence[str]) -> StateDict:
    """Select the weights of a checkpoint, all parts of the model together.

    Args:
        asked: for one part each, what `select` takes; ``auto``, ``raw`` and ``eval`` take the parts beside the weights,
            too.

    Raises:
        LayoutError: as for `select`; or a part of the model has no average, and another one has.
    """
    if "eval" in asked:
        if len(asked) > 1:
            raise LayoutError(f"{header.path}: `state='eval'` takes all parts of a model, and stands alone.")
        return evaluated(header, select_parts(header, ["raw"]))
    if [*asked] in (["auto"], ["raw"]):
        nested = [] if states(header) else [each for key in set_keys() for each in _sets(header, (key,))]
        return _joined(header, _whole(header, nested or [select(header, asked[0])], asked[0]))
    chosen = [select(header, state) for state in asked]
    for i, each in enumerate(chosen):  # no part takes another one's place
        homes = [other.home for other in chosen if other is not each]
        places = tuple(path for path in each.set_paths if not any(_meet(path, home) for home in homes))
        chosen[i] = replace(each, set_paths=places)
    return _joined(header, chosen)


def _whole(header: Header, found: Sequence[StateDict], asked: str) -> list[StateDict]:
    """Add the parts beside those that were found: one set of weights, or the dicts of a nested model."""
    first = found[0]
    nested = not states(header)
    top = first.path[:1] if nested else first.path
    beside = [
        each
        for each in (_sets(header, top[:-1]) if top else ())
        if any(map(_is_weight, each.tensors, each.tensors.values()))
        and not any(_meet(each.path, path) for path in (top, *first.set_paths))
        and (nested or not are_twins(each, first))  # the same model at another time, or another one like it
    ]
    averages = [each for each in (*found, *beside) if each.which == "raw" and is_average(each.path, top)]
    if averages and first.which == "raw" and asked == "auto":
        raise LayoutError(
            f"{header.path}: '{dotted(averages[0].path)}' looks like an average of a part of the model, and the other "
            "parts have none that is known. Give `state` for each part, or `state='raw'` for the raw weights of all."
        )
    own = dotted(first.path)
    parts = [each for each in (*found, *(() if nested else beside)) if each not in averages]
    if not parts:
        raise LayoutError(f"{header.path}: all of its dicts look like averages. Choose with `state={own!r}`.")
    for other in parts[0 if nested else 1 :]:
        alone = f"`state={own!r}` to leave '{dotted(other.path)}' as in the last checkpoint."
        if first.which == "ema":
            raise LayoutError(
                f"{header.path}: '{dotted(other.path)}' holds weights, too, and only '{own}' is an average. "
                f"Use `state='raw'` for the raw weights of both, or {alone}"
            )
        if not in_dicts(header.tree, other.path):
            raise LayoutError(f"{header.path}: '{dotted(other.path)}' holds weights, too, but in a list. Use {alone}")
    gone = tuple(each.path for each in averages if in_dicts(header.tree, each.path))
    return [replace(parts[0], set_paths=(*parts[0].set_paths, *gone)), *parts[1:]]


def _meet(path: Path, other: Path) -> bool:
    return leads(path, other) or leads(other, path)


def _sets(header: Header, above: Path) -> Iterator[StateDict]:
    """Read the dicts of tensors below a path, each as a set of its own; not those of training state."""
    for path, node in state_dicts(header.tree).items():
        each = one_of(read_sets(node), "raw") if leads(above, path) and len(path) > len(above) else None
        if each is not None and each.fault is None:
            yield replace(each.below(path), which="raw", home=path, set_paths=(path,))


def _is_weight(name: str, tensor: object) -> bool:
    """True for what only a network has: other tensors, such as the center of a loss, are not of the model."""
    return isinstance(tensor, TensorSpec) and tensor.dtype.averaged and name.rpartition(".")[2] in ("weight", "bias")


def _joined(header: Header, parts: Sequence[StateDict]) -> StateDict:
    if len(parts) == 1:
        return parts[0]
    tensors = {f"{dotted(part.path)}.{name}": tensor for part in parts for name, tensor in part.tensors.items()}
    which = {part.which for part in parts}
    befores = [f"{dotted(part.path)}." for part in parts]
    if any(a.startswith(b) for i, a in enumerate(befores) for j, b in enumerate(befores) if i != j):
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
    named = ((f"{dotted(part.path)}.", part) for part in state.parts)
    return {lead + name: lead + bare for lead, part in named for name, bare in unwrap(part.tensors).items()}
