"""Around a training function: several seeds, a table over them, and errors as one line with an exit
code."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from ..data.atomic import write_atomic
from ..data.errors import DataError
from ..metrics import format_mean_sd
from ..metrics.table import mean_and_sd
from .checkpoint import CheckpointError
from .config import ConfigError, TrainConfig
from .signals import Stopped

# columns of the table over seeds, where a run has the metric
_TITLES = {
    "dice": "Dice",
    "jaccard": "Jaccard",
    "accuracy": "accuracy",
    "hd95": "HD95 {unit}",
    "assd": "ASSD {unit}",
}


def run_seeds(config: TrainConfig, train: Callable[[TrainConfig, Path], dict | None]) -> None:
    """Train once, or once per seed of --seeds and print mean ± sd over the runs.

    Args:
        train: trains in a folder and returns the summary of `evaluate` (None when nothing was
            scored).
    """
    folder = config.out / config.exp
    if not config.seeds:
        train(config, folder)
        return
    summaries = {}
    for seed in config.seeds:
        one = dataclasses.replace(config, seed=seed, seeds=())
        summaries[seed] = train(one, folder / f"seed_{seed}")
    lines = seed_table(summaries)
    print("\n".join(lines))
    text = "\n".join(lines) + "\n"
    write_atomic(folder / "seeds.md", lambda file: file.write(text.encode()))
    values = json.dumps({str(k): v for k, v in summaries.items()}, indent=2)
    write_atomic(folder / "seeds.json", lambda file: file.write(values.encode()))


def seed_table(summaries: dict[int, dict | None]) -> list[str]:
    """Markdown table: one row per seed (mean over cases), last row mean ± sd over seeds."""
    scored = {seed: s["mean"] for seed, s in summaries.items() if s is not None}
    known = next(iter(scored.values()), {"dice": None, "hd95": None, "assd": None})
    unit = next((s["settings"]["unit"] for s in summaries.values() if s is not None), "mm")
    metrics = {m: title.format(unit=unit) for m, title in _TITLES.items() if m in known}
    lines = [
        f"| seed | {' | '.join(metrics.values())} | missed |",
        "|---" * (len(metrics) + 2) + "|",
    ]
    for seed, mean in scored.items():
        cells = [f"{mean[m]['mean']:.3f}" for m in metrics]
        lines.append(f"| {seed} | {' | '.join(cells)} | {mean['n_missed']} |")
    columns = [mean_and_sd([mean[m]["mean"] for mean in scored.values()]) for m in metrics]
    missed = sum(mean["n_missed"] for mean in scored.values())
    cells = [format_mean_sd(column) for column in columns]
    lines.append(f"| mean ± sd, {len(scored)} seeds | {' | '.join(cells)} | {missed} |")
    return lines


def exit_with_one_line(main: Callable[[], None]) -> None:
    """Run a program; expected errors become one line on stderr and an exit code, others keep their
    traceback.

    Exit codes: 0 finished, 1 bad data or checkpoint, 2 bad settings, 128 + n stopped by signal n
        (state saved).
    """
    try:
        main()
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; continue with --resume auto", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (DataError, CheckpointError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
