"""Log of a run: plain lines in log.txt, records in metrics.jsonl, TensorBoard events, a progress
bar on a terminal."""

import json
import logging
import math
import sys
import time
from pathlib import Path

from ..data.atomic import write_atomic

# TensorBoard tags of SSL4MIS, so that curves of both lie over each other
_SSL4MIS_TAGS = {
    "lr": "info/lr",
    "loss": "info/total_loss",
    "consistency_weight": "info/consistency_weight",
}


class RunLog:
    """Writes to one run folder. Records are numbers keyed by (stage, iteration).

    Args:
        folder: the run folder (created).
        tensorboard: write events to folder/tensorboard/<stage> if the package is installed.
        quiet: nothing on the console, only files.
    """

    def __init__(self, folder: str | Path, *, tensorboard: bool = False, quiet: bool = False):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._metrics_path = self.folder / "metrics.jsonl"
        self._tensorboard = tensorboard
        self._writers: dict = {}
        self._progress = self._task = None
        self._logger = logging.getLogger(f"medcl_train.{self.folder.resolve()}")
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False
        self._file = logging.FileHandler(self.folder / "log.txt", encoding="utf-8")
        self._file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self._logger.addHandler(self._file)
        self._console = None
        if not quiet:
            self._console = logging.StreamHandler(sys.stdout)
            self._console.setFormatter(logging.Formatter("%(message)s"))
            self._logger.addHandler(self._console)

    def info(self, message: str) -> None:
        """One line to log.txt and the console."""
        self._logger.info(message)

    def record(self, stage: str, iteration: int, values: dict[str, float]) -> None:
        """Append one record to metrics.jsonl and TensorBoard. NaN and infinity become null: JSON
        has no such number."""
        clean = {k: (v if math.isfinite(v) else None) for k, v in values.items()}
        line = json.dumps({"stage": stage, "iteration": iteration, **clean})
        with open(self._metrics_path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        writer = self._writer(stage, iteration)
        if writer is not None:
            for name, value in values.items():
                writer.add_scalar(_SSL4MIS_TAGS.get(name, f"info/{name}"), value, iteration)

    def rewind(self, stage: str | None, iteration: int = 0) -> None:
        """Drop records that come after a checkpoint (stage, iteration): the resumed run will write
        them again."""
        if not self._metrics_path.is_file():
            return
        kept, reached = [], False
        for record in read_metrics(self._metrics_path):
            reached = reached or record["stage"] == stage
            after = record["stage"] == stage and record["iteration"] > iteration
            if stage is None or after or (reached and record["stage"] != stage):
                break
            kept.append(json.dumps(record) + "\n")
        text = "".join(kept).encode()
        write_atomic(self._metrics_path, lambda file: file.write(text), "log")

    def start_progress(self, stage: str, total: int, done: int) -> None:
        """Show a progress bar when the console is a terminal and rich is installed."""
        if self._console is None or not sys.stdout.isatty():
            return
        try:
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )
        except ImportError:
            return
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, TextColumn("{task.fields[note]}"))
        self._progress.start()
        self._task = self._progress.add_task(stage, total=total, completed=done, note="")
        self._logger.removeHandler(
            self._console
        )  # the bar shows the numbers; lines still go to log.txt

    def advance(self) -> None:
        """Move the bar by one iteration."""
        if self._progress is not None:
            self._progress.update(self._task, advance=1)

    def note(self, text: str) -> None:
        """Text beside the bar."""
        if self._progress is not None:
            self._progress.update(self._task, note=text)

    def stop_progress(self) -> None:
        """Remove the bar; console lines come back."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            self._logger.addHandler(self._console)

    def close(self) -> None:
        self.stop_progress()
        for writer in self._writers.values():
            if writer is not None:
                writer.close()
        for handler in (self._file, self._console):
            if handler is not None:
                self._logger.removeHandler(handler)
        self._file.close()

    def _writer(self, stage: str, iteration: int):
        if not self._tensorboard:
            return None
        if stage not in self._writers:
            try:
                from torch.utils.tensorboard import SummaryWriter

                folder = self.folder / "tensorboard" / stage
                self._writers[stage] = SummaryWriter(str(folder), purge_step=iteration)
            except ImportError:
                self._writers[stage] = None
                self.info(
                    "TensorBoard is not installed: curves are in metrics.jsonl and report.html only"
                )
        return self._writers[stage]


def read_metrics(path: str | Path) -> list[dict]:
    """Records of a metrics.jsonl; a last line that a kill cut short is left out."""
    records = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines()):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number + 1 == len(Path(path).read_text(encoding="utf-8").splitlines()):
                break
            raise ValueError(f"{path}, line {number + 1}: not a JSON record ({error})") from error
    return records


class Stopwatch:
    """Mean seconds per step since the last reading."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self._start, self._steps = time.perf_counter(), 0

    def step(self) -> None:
        self._steps += 1

    def read(self) -> float:
        """Mean seconds per step; NaN before the first. Starts the next window."""
        value = (time.perf_counter() - self._start) / self._steps if self._steps else float("nan")
        self.reset()
        return value
