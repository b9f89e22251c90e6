"""Prints the format, the counts, the first requests and the warnings of a file of facts."""

from __future__ import annotations

import io
import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hiedit_env.datasets.load import read_dataset
from hiedit_env.datasets.report import DatasetReport
from hiedit_env.datasets.requests import Probe, Request
from hiedit_env.datasets.writing import space_between
from hiedit_env.errors import HieditError

#: Requests that are shown in full.
SHOWN = 3


def main(file: str) -> int:
    """Prints what was understood of a data set; edits nothing.

    Args:
        file: A path, a built-in name, or ``-`` for standard input.

    Returns:
        Exit status: 0, or 2 for a file that is refused; the reason is on standard error.
    """
    try:
        describe(file)
    except HieditError as error:
        print(f"hiedit: error: {error}", file=sys.stderr)
        return 2
    return 0


def describe(file: str) -> None:
    """``hiedit data FILE``: as :func:`main`, but the error of a refused file is raised.

    Args:
        file: As in :func:`main`.

    Raises:
        DatasetError: the file is refused; nothing is printed.
    """
    report = read_dataset(file)
    if isinstance(sys.stdout, io.TextIOWrapper):  # what the terminal cannot show is escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    show(report, Console(highlight=False, soft_wrap=True))


def show(report: DatasetReport, console: Console) -> None:
    """Prints a report.

    Args:
        report: Of :func:`~hiedit_env.datasets.load.read_dataset`.
        console: Where to.
    """
    console.print(Text(f"{report.name}: format {report.format}"))
    counts = Table(box=None, show_header=False, pad_edge=False)
    counts.add_column(justify="right")
    counts.add_column()
    for name, count in report.counts.items():
        counts.add_row(str(count), name)
    console.print(counts)
    for request in report.requests[:SHOWN]:
        console.print()
        console.print(_request(request))
    if len(report.requests) > SHOWN:
        console.print(Text(f"\n… and {len(report.requests) - SHOWN} more facts"))
    remarks = report.remarks()
    if remarks:
        console.print()
    for remark in remarks:
        console.print(Text(f"warning: {remark}"))


def _request(request: Request) -> Text:
    """All texts of a request, quoted so that white space at their ends is seen."""
    lines = [
        request.source,
        f"  prompt       {request.prompt!r}",
        f"  answer       {request.answer!r}",
        f"  read as      {_joined(request)!r}",
        f"  subject      {request.subject!r}",
    ]
    for name, value in (("old answer", request.old_answer), ("relation", request.relation)):
        if value is not None:
            lines.append(f"  {name:12} {value!r}")
    lines += [f"  paraphrase   {text!r}" for text in request.paraphrases]
    if request.prompt_form is not None:
        lines.append(f"  form         {request.prompt_form}")
    if request.system is not None:
        lines.append(f"  system       {request.system!r}")
    lines += [f"  {probe.kind or 'unrelated':12} {_probe(probe)}" for probe in request.locality]
    lines += [f"  portability  {_probe(probe)} ({probe.kind})" for probe in request.portability]
    lines += [f"  also called  {name!r}" for name in request.subject_aliases]
    if request.true_layers:
        lines.append(f"  true layers  {', '.join(request.true_layers)}")
    return Text("\n".join(lines))


def _joined(request: Request) -> str:
    """The end of the text that is learned: the seam of prompt and answer."""
    before = " ".join(request.prompt.split(" ")[-3:])
    start = "" if before == request.prompt else "…"
    return start + before + space_between(request.prompt, request.answer) + request.answer


def _probe(probe: Probe) -> str:
    also = f" or {', '.join(map(repr, probe.aliases))}" if probe.aliases else ""
    return f"{probe.prompt!r} → {probe.answer!r}{also}"
