"""TensorBoard files of a series of checkpoints, a folder a run."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

from lightning_koopman.entries import Entry
from lightning_koopman.loggers import EventFile
from lightning_koopman.report import CreditReport
from lightning_koopman.writers import CreditWriter


class RunLogs:
    """TensorBoard files of a series, a folder a run.

    Args:
        logdir: Folder above those of the runs; ``None`` writes nothing.
    """

    def __init__(self, logdir: str | os.PathLike[str] | None) -> None:
        self._logdir = logdir
        self._logs: dict[str, _RunLog] = {}

    def add(self, report: CreditReport, *, known: bool) -> None:
        """Write one report.

        Args:
            report: The next one of its run.
            known: Whether an earlier evaluation measured it, and so wrote it where it wrote any.
        """
        if self._logdir is None:
            return
        if report.run not in self._logs:
            self._logs[report.run] = _RunLog(os.path.join(self._logdir, report.run))
        self._logs[report.run].add(report, known=known)

    def add_known(self, waiting: deque[Entry], before: Entry | None = None) -> None:
        """Take entries off a queue until one is met, and write those known.

        Args:
            waiting: Entries in order; shortened.
            before: The entry to stop at; ``None`` takes all.
        """
        while waiting and (entry := waiting.popleft()).path != getattr(before, "path", None):
            if entry.known is not None:
                self.add(entry.known, known=True)

    def finish(self) -> None:
        """Draw what is drawn at the end of a run."""
        for log in self._logs.values():
            log.finish()

    def close(self) -> None:
        """Close the files."""
        for log in self._logs.values():
            log.close()


class _RunLog:
    """Event file of one run; reports that an earlier evaluation wrote there are not repeated."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._started = any(Path(folder).glob("events.out.tfevents.*"))
        self._writer = CreditWriter()
        self._files: list[EventFile] = []
        self._reports: list[CreditReport] = []

    def add(self, report: CreditReport, *, known: bool) -> None:
        self._reports.append(report)
        scalars = self._writer.scalars(report)
        if known and self._started:
            return
        if not self._files:
            self._files = [EventFile(self._folder)]
        step = report.step or 0
        self._writer.draw(self._files, self._reports, step)
        self._files[0].log_metrics(scalars, step)

    def finish(self) -> None:
        if self._files:
            self._writer.finish(self._files, self._reports, self._reports[-1].step or 0)

    def close(self) -> None:
        for file in self._files:
            file.close()
