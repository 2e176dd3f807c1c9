"""Stored profiles: which training steps a set of weights is an average of, as checkpoint, name or user say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatch

from ..checkpoints.ema_updates import stored_decay
from ..checkpoints.layouts import StateDict
from ..checkpoints.layouts.layout import dotted
from ..checkpoints.script_arguments import script_arguments
from ..errors import SeriesError, UsageError
from .member import Member
from .profiles import Profile, parse_profile

_DECAY = re.compile(r"(?<![a-z])ema[-_=]?(0\.\d+)(?!\d)", re.IGNORECASE)
_SIGMA = re.compile(r"sigma[-_]?rel[-_=]?(0\.\d+)|^(?:network-snapshot|phema)-\d+-(0\.\d+)(?=\.\w+$)", re.IGNORECASE)


def stored_profiles(sources: Sequence[tuple[Member, StateDict]], asked: Sequence[str]) -> list[Profile]:
    """Return the profile of each set of weights.

    Args:
        sources: checkpoints, oldest first, each with one of its sets.
        asked: ``GLOB=PROFILE``; the last that matches the name of the file, or ``NAME:PATH`` of the set in it, decides.

    Raises:
        SeriesError: a checkpoint has no step, or nothing tells how its average was made.
        UsageError: `asked` has something else than a profile, or a glob that matches nothing.
    """
    for given in asked:
        pattern = given.partition("=")[0]
        if not any(fnmatch(name, pattern) for member, state in sources for name in _names(member, state)):
            raise UsageError(f"`profile={given!r}`: no checkpoint matches {pattern!r}; a glob takes the whole name.")
    profiles = []
    for member, state in sources:
        end = member.step
        if end is None or end <= 0:
            what = "no step that is known" if end is None else f"step {end}"
            leave = "" if end is None else " Leave it out with `from_step=1`."
            raise SeriesError(f"{member.path}: has {what}, and `mode='posthoc'` needs one above 0.{leave}")
        profiles.append(parse_profile("profile", _text(member, state, asked), end))
    return profiles


def _names(member: Member, state: StateDict) -> tuple[str, ...]:
    return member.path.name, f"{member.path.name}:{dotted(state.path)}", str(member.path)


def _text(member: Member, state: StateDict, asked: Sequence[str]) -> str:
    names = _names(member, state)
    for given in reversed(asked):
        pattern, _, text = given.partition("=")
        if any(fnmatch(name, pattern) for name in names):
            return text
    width = _SIGMA.search(member.path.name)
    if width is not None:
        return f"sigma-rel={width[1] or width[2]}"
    decay = _decay(member, state)
    if decay is not None:
        if member.counter == "epoch":
            raise SeriesError(
                f"{member.path}: its decay of {decay} is for an update, and the file counts epochs. Give the half-life "
                f"in epochs: `profile='{member.path.name}=half-life:3'`."
            )
        return f"decay={decay}"
    if state.which == "raw":
        return "snapshot"
    several = f"; for one set of several, '{member.path.name}:{dotted(state.path)}=...'" if state.path else ""
    raise SeriesError(
        f"{member.path}: nothing tells which steps its {state.label} is an average of: it stores no decay, and its "
        f"name has none. Say it: `profile='{member.path.name}=decay:0.9999'`, or sigma-rel, gamma or half-life, for "
        f"this file or a glob{several}."
    )


def _decay(member: Member, state: StateDict) -> float | None:
    """Look for a decay in the average, in the arguments of timm's script, and in names."""
    stored = stored_decay(member.header, state) if state.which == "ema" else None
    if stored is None and state.which == "ema":
        given = script_arguments(member.header).get("model_ema_decay")
        stored = given if isinstance(given, float) else None
    if stored is None:
        named = _DECAY.search(member.path.name) or _DECAY.search(
            "ema_" + dotted(state.path).rpartition("ema")[2].strip("._")
        )
        stored = None if named is None else float(named[1])
    return stored if stored is not None and 0 < stored < 1 else None
