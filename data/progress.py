"""The one look of every progress bar."""

from accelerate import PartialState
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def progress_bar() -> Progress:
    """A bar with a count, the elapsed and the remaining time, and a free `status` field.

    Only the main process shows it. Outside a terminal rich prints the last state once, so logs
    stay short.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        disable=not PartialState().is_main_process,
    )


def say(line: str) -> None:
    """Print a line, once for all processes of a run."""
    if PartialState().is_main_process:
        print(line, flush=True)
