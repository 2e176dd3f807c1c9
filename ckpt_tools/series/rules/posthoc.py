"""Post-hoc EMA: an average that was never kept, from those that were (EDM2, arXiv 2312.02696, algorithm 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...errors import UsageError
from ..profiles import Profile, mixture, parse_profile
from .option import Option
from .rule import Rule

_MISFIT = 0.1
"""The largest relative residual that is a fit."""


def posthoc(
    profiles: Sequence[Profile], *, target: str | None, allow_misfit: bool = False, **_: Any
) -> tuple[float, ...]:
    """Weigh averages such that their sum is nearest to a profile.

    Args:
        profiles: of the averages, the last of which ends where the new one does.
        target: the profile, such as ``sigma-rel=0.12``.
        allow_misfit: take the nearest sum however far it is.

    Raises:
        UsageError: not a profile, or the averages cannot make it.
    """
    coefficients, residual = mixture(tuple(profiles), _wanted(profiles, target))
    if residual > _MISFIT and not allow_misfit:
        alone = all(profile.kind == "snapshot" for profile in profiles)
        rules = " To average snapshots alone, use `sigma_rel`, `gamma` or `half_life` without `mode='posthoc'`."
        raise UsageError(
            f"`target={target!r}`: the nearest sum of these averages differs from it by {residual:.1%} of its profile, "
            f"and more than {_MISFIT:.0%} is no fit. Add averages of other widths or steps, or `allow_misfit`."
            f"{rules if alone else ''}"
        )
    return coefficients


def _wanted(profiles: Sequence[Profile], target: str | None) -> Profile:
    if target is None:
        raise UsageError("`mode='posthoc'` needs `target`, such as sigma-rel=0.12 or half-life=5%.")
    return parse_profile("target", target, max(profile.end for profile in profiles))


def _remarks(profiles: Sequence[Profile], *, target: str | None, **_: Any) -> list[str]:
    residual = mixture(tuple(profiles), _wanted(profiles, target))[1]
    kinds = {kind: sum(profile.kind == kind for profile in profiles) for kind in ("power", "exponential", "snapshot")}
    made = " and ".join(f"{n} {kind}" for kind, n in kinds.items() if n)
    return [f"{target} from {made} profiles: the sum differs from it by {residual:.2%} (relative residual)."]


def _check(*, target: str | None, profile: Sequence[str], **_: Any) -> None:
    _wanted([Profile(1.0, "snapshot")], target)
    for given in profile:
        pattern, equals, text = given.partition("=")
        if not (pattern and equals):
            raise UsageError(f"`profile={given!r}`: write GLOB=sigma-rel:0.05, GLOB=decay:0.9999 or alike.")
        parse_profile("profile", text, 1.0)


RULE = Rule(
    posthoc,
    (
        Option(
            "target", str, None, "posthoc: the average wanted: sigma-rel=S, gamma=G, half-life=SPAN or decay=F.",
            metavar="PROFILE",
        ),
        Option(
            "profile", Sequence[str], (), "posthoc: what files hold, where they do not say it: 'GLOB=decay:0.999'.",
            metavar="GLOB=P",
        ),
        Option("allow_misfit", bool, False, "posthoc: take the nearest sum, even if it is far from the target."),
    ),
    check=_check,
    remarks=_remarks,
    needs="profile",
)  # fmt: skip
