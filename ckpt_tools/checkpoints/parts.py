"""Parts: a model whose weights are in several dicts of a checkpoint, such as an encoder and a decoder.

All parts go into one average: one of them from the last checkpoint alone would make a mixture of two models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from ..errors import LayoutError, UsageError
from ..formats.header import Header
from ..formats.tree import Path
from ..formats.tree import holds as in_dicts
from .layouts import StateDict, select, states
from .layouts.counterparts import are_twins, completed, is_average, is_parameter, is_weight, whole_entry, with_names_of
from .layouts.layout import Sets, dotted, one_of, read_sets, set_keys
from .layouts.schedule_free import evaluated
from .prefixes import unwrap
from .state_dicts import state_dicts
from .training_state import leads


def select_parts(header: Header, asked: Sequence[str]) -> StateDict:
    """Select the weights of a checkpoint, all parts of the model together.

    Args:
        asked: for one part each, what `select` takes; ``auto``, ``raw``, ``ema`` and ``eval`` take all parts of the
            model.

    Raises:
        LayoutError: as for `select`; or a part of the model has no average, and another one has.
        UsageError: nothing is asked for.
    """
    if not asked:
        raise UsageError("`state` is empty. Give a set of weights, or leave it out.")
    if "eval" in asked:
        if len(asked) > 1:
            raise LayoutError(f"{header.path}: `state='eval'` takes all parts of a model, and stands alone.")
        return evaluated(header, select_parts(header, ["raw"]))
    if [*asked] in (["auto"], ["raw"], ["ema"]):
        nested = [] if states(header) else [each for key in set_keys() for each in _sets(header, (key,))]
        if not states(header) and (numbered := _numbered_models(header)):
            nested += [each for each in _sets(header, ()) if each.path[0] in numbered]
        return _joined(header, _whole(header, nested or [select(header, asked[0])], asked[0]))
    chosen = [select(header, state) for state in asked]
    for i, each in enumerate(chosen):  # no part takes another one's place
        homes = [other.home for other in chosen if other is not each]
        places = tuple(path for path in each.set_paths if not any(_meet(path, home) for home in homes))
        chosen[i] = replace(each, set_paths=places)
    return _joined(header, chosen)


def of_ranks(header: Header, choose: Callable[[Header], StateDict]) -> StateDict:
    """Select the weights of a checkpoint, those in the files of all ranks together.

    Args:
        choose: from the header of one file to the weights in it.

    Raises:
        LayoutError: as `choose`; or one rank has averages, and another one has none.
    """
    if not header.ranks:
        return choose(header)
    parts: list[StateDict] = []
    for name, each in header.ranks.items():
        chosen = choose(each)
        own = chosen.parts or (chosen,)
        parts += [replace(part.below((name,)), file=name) for part in own]
    return _joined(header, parts)


def _numbered_models(header: Header) -> list[str]:
    """Return the keys of the models of Megatron-LM's interleaved pipelines: model0, model1, and so on."""
    tree = header.tree if isinstance(header.tree, dict) else {}
    found = [key for key in tree if isinstance(key, str) and re.fullmatch(r"model\d", key)]
    return found if len(found) > 1 and all(f"model{i}" in tree for i in range(len(found))) else []


def _whole(header: Header, found: Sequence[StateDict], asked: str) -> list[StateDict]:
    """Add the parts beside those that were found: one set of weights, or the dicts of a nested model."""
    first = found[0]
    nested = not states(header)
    top = first.path[:1] if nested else first.path
    beside = [
        each
        for each in (_sets(header, top[:-1]) if top else ())
        if any(map(is_weight, each.tensors, each.tensors.values()))
        and not any(_meet(each.path, path) for path in (top, *first.set_paths))
        and (nested or not are_twins(each, first))  # the same model at another time, or another one like it
    ]
    averages = [each for each in (*found, *beside) if each.which == "raw" and is_average(each.path, top)]
    others = [completed(header.tree, {"raw": each}) for each in beside if not nested and each not in averages]
    strange = [*averages, *(sets["ema"] for sets in others if "ema" in sets)]
    if strange and first.which == "raw" and asked == "auto":
        raise LayoutError(
            f"{header.path}: '{dotted(strange[0].path)}' looks like an average of a part of the model, and the other "
            "parts have none that is known. Give `state` for each part, or `state='raw'` for the raw weights of all."
        )
    own = dotted(first.path)
    parts = [each for each in found if each not in averages]
    if not parts:
        raise LayoutError(f"{header.path}: all of its dicts look like averages. Choose with `state={own!r}`.")
    if first.which == "ema" and others:
        parts = [in_place(header, first), *map(_averaged, others)]
    else:
        parts += [sets["raw"] for sets in others]
    for other in parts[0 if nested else 1 :]:
        alone = f"`state={own!r}` to leave '{dotted(other.path)}' as in the last checkpoint."
        if first.which == "ema" and other.which != "ema":
            raise LayoutError(
                f"{header.path}: '{dotted(other.path)}' holds weights, too, and only '{own}' is an average. "
                f"Use `state='raw'` for the raw weights of both, or {alone}"
            )
        if not in_dicts(header.tree, other.path):
            raise LayoutError(f"{header.path}: '{dotted(other.path)}' holds weights, too, but in a list. Use {alone}")
    gone = tuple(whole_entry(each.path, top) for each in averages)
    return [replace(parts[0], set_paths=(*parts[0].set_paths, *gone)), *parts[1:]]


def _averaged(part: Sets) -> StateDict:
    """Return the average of a part under the names of its raw weights; these where it has none that can be used."""
    ema = part.get("ema")
    return part["raw"] if ema is None or ema.fault is not None else with_names_of(part["raw"], ema) or part["raw"]


def in_place(header: Header, chosen: StateDict) -> StateDict:
    """Give an average that takes the place of raw weights their names, and the buffers that it may lack.

    Raises:
        LayoutError: it has other names or shapes, and no script could load it from there.
    """
    raw = states(header).get("raw") if chosen.home != chosen.path else None
    if raw is None or raw.fault is not None or raw.path != chosen.home:
        return chosen
    named = with_names_of(raw, chosen)
    if named is None:
        raise LayoutError(
            f"{header.path}: its {chosen.label} has other names or shapes than {raw.label}, so it cannot take "
            "the place of these. Use `state='raw'`, or make a file of each average first: `convert(to='plain')`."
        )
    return named


def not_averaged(header: Header, chosen: StateDict) -> list[str]:
    """List the parameters of an average that are raw weights: those of a loss, say, beside the averaged net."""
    raw = states(header).get("raw") if chosen.which == "ema" else None
    known = {} if raw is None else raw.tensors
    return [name for name, tensor in chosen.tensors.items() if known.get(name) is tensor and is_parameter(name, tensor)]


def _meet(path: Path, other: Path) -> bool:
    return leads(path, other) or leads(other, path)


def _sets(header: Header, above: Path) -> Iterator[StateDict]:
    """Read the dicts of tensors below a path, each as a set of its own; not those of training state."""
    for path, node in state_dicts(header.tree).items():
        each = one_of(read_sets(node), "raw") if leads(above, path) and len(path) > len(above) else None
        if each is not None and each.fault is None:
            yield replace(each.below(path), which="raw", home=path, set_paths=(path,))


def _joined(header: Header, parts: Sequence[StateDict]) -> StateDict:
    if len(parts) == 1 and not header.ranks:
        return parts[0]
    tensors = {f"{part.lead}{name}": tensor for part in parts for name, tensor in part.tensors.items()}
    which = {part.which for part in parts}
    if any(lead.startswith(before) for before, lead in pairwise(sorted(part.lead for part in parts))):
        raise LayoutError(f"{header.path}: {' and '.join(part.label for part in parts)} give one name to two tensors.")
    if "ema" in which and len(which) > 1:
        labels = " and ".join(part.label for part in parts)
        raise LayoutError(
            f"{header.path}: {labels} cannot be mixed. Give `state` for raw or for averaged weights alone."
        )
    return StateDict(
        tensors,
        which=" and ".join(sorted(which) if header.ranks else (part.label for part in parts)),
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
    return {part.lead + name: part.lead + bare for part in state.parts for name, bare in unwrap(part.tensors).items()}
