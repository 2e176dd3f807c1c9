"""Keys: the prefixes that wrappers put before the names of tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from ..errors import AlignmentError

WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What DataParallel and DDP, torch.compile, FSDP and activation checkpointing put before names."""
# The private names no model of its own uses, so they go wherever they stand; `module` only goes in front of all.
_LEADING, *_ANYWHERE = WRAPPERS


def unwrap(names: Iterable[str]) -> dict[str, str]:
    """Map each name to the one without wrapper prefixes.

    A leading prefix goes only where every name carries it, until none is left, in whatever order they were
    put on; the private ones (``_orig_mod.`` and the like) go in the middle of names, too.

    Raises:
        AlignmentError: two names become one.
    """
    names = list(names)
    text = "\n".join(names)
    if not any(wrapper in text for wrapper in _ANYWHERE) and not (names and names[0].startswith(_LEADING)):
        return dict(zip(names, names, strict=True))
    strip = unwrapping(names)
    mapping = {name: strip(name) for name in names}
    taken: dict[str, str] = {}
    for name, bare in mapping.items():
        if bare in taken:
            raise AlignmentError(
                f"'{taken[bare]}' and '{name}' are both '{bare}' without wrapper prefixes. Rename one first."
            )
        taken[bare] = name
    return mapping


def unwrapping(names: Iterable[str]) -> Callable[[str], str]:
    """Make the function that takes from a name the wrapper prefixes that go from all these names; see `unwrap`."""
    bare = [_strip_private(name) for name in names]
    depth = 0
    while bare and all(name.startswith(_LEADING) and name != _LEADING for name in bare):
        bare = [_strip_private(name.removeprefix(_LEADING)) for name in bare]
        depth += 1

    def strip(name: str) -> str:
        name = _strip_private(name)
        for _ in range(depth):
            name = _strip_private(name.removeprefix(_LEADING))
        return name

    return strip


def _strip_private(name: str) -> str:
    before = ""
    while name != before:
        before = name
        for wrapper in _ANYWHERE:
            name = name.removeprefix(wrapper).replace(f".{wrapper}", ".")
    return name


def prefixes(names: Iterable[str]) -> Counter[str]:
    """Count the names that carry each wrapper prefix, in front or in the middle."""
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")[:-1]
        for wrapper in WRAPPERS:
            bare = wrapper.rstrip(".")
            if bare in parts if wrapper in _ANYWHERE else parts[:1] == [bare]:
                counts[wrapper] += 1
    return counts
