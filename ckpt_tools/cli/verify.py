"""`ckpt verify`: parse, check, show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from ..jobs.options import Reading, Verification
from . import arguments, console

if TYPE_CHECKING:
    from ..jobs.verify.job import VerifyReport


@arguments.with_options(Verification, Reading)
def verify(
    checkpoints: Annotated[list[str], typer.Argument(metavar="CKPT...", help="Files, or folders.")],
    *,
    json: arguments.Json = False,
    **options: Any,
) -> None:
    """Check that checkpoints are whole, and that outputs are what their records say.

    Example: ckpt verify averaged.pth
    """
    from ..jobs.verify.file import is_digest
    from ..jobs.verify.job import verify as check

    expected = options["expect_sha256"]
    if len(checkpoints) > 1 and expected is not None and is_digest(expected):
        raise UsageError(
            f"`expect_sha256`: one SHA-256 cannot be that of {len(checkpoints)} checkpoints. Give a list of theirs, as "
            "sha256sum writes it."
        )
    reports = []
    for checkpoint in checkpoints:
        report, _ = arguments.carried_out(check, arguments.path(checkpoint), **options)
        reports.append(report)
        _show(report, console.shown_by(asked=True, json=json))
    passed = all(report.passed for report in reports)
    if json:
        console.print_json({"passed": passed, "checkpoints": [_plain(report) for report in reports]})
    if not passed:
        raise typer.Exit(1)


def _show(report: VerifyReport, tell: console.Tell) -> None:
    tell(f"{report.path}:")
    width = max(len(check.name) for check in report.checks)
    for check in report.checks:
        tell(f"  {check.result:<11}  {check.name:<{width}}  {arguments.spelled(check.detail)}")
    failed, left = report.count("failed"), report.count("not checked")
    verdict = f"{console.plural(failed, 'check')} failed" if failed else f"{report.count('ok')} checks passed"
    tell(f"{'FAILED' if failed else 'Verified'}: {verdict}" + (f", {left} not made." if left else "."))


def _plain(report: VerifyReport) -> dict[str, Any]:
    data = report.to_dict()
    return data | {
        "checks": [each | {"detail": arguments.spelled(each["detail"])} for each in data["checks"]],
    }
