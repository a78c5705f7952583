#!/usr/bin/env python3
"""Paired study over several draws of labelled subjects: supervised-only training against IDEAL or
GCL, a backbone against PDCR, UAFS and both.

    python python/compare.py --config python/configs/ideal_hippocampus.yaml --data-root DIR
    python python/compare.py --trainer gcl --config python/configs/gcl_hippocampus.yaml \\
        --data-root DIR --draws 8@1 4@2 --arms supervised gcl gcl_unfiltered gcl_mean
    python python/compare.py --trainer pdcr --config python/configs/pdcr_isic.yaml \\
        --data-root DIR --draws 4@25% 4@100%

All arms of a draw share the labelled subjects, the initial encoder and decoder D1, the labelled
batches with their augmentation, and the number of supervised iterations; only IDEAL and GCL have
stage 1, only IDEAL has decoder D2 and the unlabelled slices. Pre-training sees no label and
therefore no draw: it is run once per pre-training seed (and per arm that changes it), and draw d
uses seed d mod --pretrain-seeds. PDCR has no pre-training. Finished runs are skipped, so a stopped
study continues where it was.
"""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from medcl_train.data import shared_data_root
from medcl_train.data.atomic import write_atomic
from medcl_train.engine.config import ConfigError, load_config
from medcl_train.engine.runs import exit_with_one_line
from medcl_train.gcl import GclConfig
from medcl_train.ideal import IdealConfig
from medcl_train.pdcr import PdcrConfig
from medcl_train.report.study import collect_run, study_markdown

CONFIGS = {config.trainer: config for config in (IdealConfig, GclConfig, PdcrConfig)}
PRETRAINED = "PRETRAINED"  # stands for the checkpoint of the draw's pre-training seed
FROM_PRETRAINED = ["--pretrained", PRETRAINED]
ARMS = {
    "ideal": {
        "supervised": ["--method", "supervised"],
        "ideal": ["--method", "ideal", *FROM_PRETRAINED],
        # parts of IDEAL, to see where a difference comes from
        "pretrained": ["--method", "supervised", *FROM_PRETRAINED],
        "cross": ["--method", "ideal", "--pretrain-iterations", "0"],
        "twin": ["--method", "ideal", "--pretrain-iterations", "0", "--consistency", "0"],
    },
    "gcl": {
        "supervised": ["--method", "supervised"],
        "gcl": FROM_PRETRAINED,
        # GCL without its parts, pre-trained so
        "gcl_unfiltered": [*FROM_PRETRAINED, "--keep", "1"],
        "gcl_mean": [*FROM_PRETRAINED, "--mitigator", "mean"],
    },
    "pdcr": {arm: ["--method", arm] for arm in ("backbone", "pdcr", "uafs", "both")},
}
DEFAULT_ARMS = {"ideal": ("supervised", "ideal"), "gcl": ("supervised", "gcl")}
SHARED = {"msd": "msd_hippocampus", "isic": "isic2017_256"}  # folders of the shared data


@dataclass(frozen=True)
class Study:
    """Which runs to make and where."""

    config: Path
    """Settings of every run (YAML)."""
    trainer: Literal["ideal", "gcl", "pdcr"] = "ideal"
    """train_ideal.py, train_gcl.py or train_pdcr.py."""
    data_root: Path | None = None
    """Folder of the data; default: msd_hippocampus or isic2017_256 in the shared data folder."""
    out: Path = Path("runs/compare")
    """Folder of the runs, runs.json and results.md."""
    draws: tuple[str, ...] = ("8@1", "4@2", "4@4")
    """Draws and labelled subjects: 8@1 = eight draws of one subject; 4@25% = four draws of a
    quarter of the training subjects (PDCR)."""
    arms: tuple[str, ...] = ()
    """The first arm is the one the others are compared with; default: supervised and the trainer,
    for pdcr: backbone, pdcr, uafs, both. Also, for ideal: pretrained, cross, twin; for gcl:
    gcl_unfiltered (no Gradient Filter), gcl_mean (plain mean instead of the Gradient
    Mitigator)."""
    against: tuple[str, ...] = ()
    """Further arms to compare with: those between the first and one of these in --arms."""
    pretrain_seeds: int = 4
    """Number of pre-trainings; draw d uses number d mod this."""
    jobs: int = 2
    """Runs at a time, each with one CPU thread."""
    options: str = ""
    """Further options of every run in one string: --options="--max-iterations 100 --val-every
    0"."""


def main():
    study = tyro.cli(Study, description=__doc__)
    plan = parse_draws(study.draws)
    arms = ARMS[study.trainer]
    study = replace(study, arms=study.arms or DEFAULT_ARMS.get(study.trainer, tuple(arms)))
    for given, known in ((study.arms, arms), (study.against, study.arms)):
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ConfigError(f"unknown arm {', '.join(unknown)}; choose from {', '.join(known)}")
    settings = load_config(CONFIGS[study.trainer], study.config)  # fails early on a wrong file
    script = Path(__file__).resolve().with_name(f"train_{study.trainer}.py")
    base = [sys.executable, str(script), "--config", str(study.config), "--out", str(study.out)]
    base += ["--data-root", str(data_root(study, settings)), "--threads", "1", "--device", "cpu"]
    base += ["--resume", "auto", "--no-tensorboard", "--no-report"]
    base += shlex.split(study.options)

    runs = [
        {"arm": arm, "labeled": n, "draw": d, "pretrain_seed": d % study.pretrain_seeds}
        for arm in study.arms
        for n, count in plan
        for d in range(count)
    ]
    needs_pretraining = [r for r in runs if PRETRAINED in arms[r["arm"]]]
    others = [r for r in runs if r not in needs_pretraining]
    jobs = [pretraining_job(study, base, run) for run in needs_pretraining]
    first = list({folder: (folder, *job) for folder, *job in jobs}.values())
    first += [run_job(study, base, run) for run in others]
    with ThreadPoolExecutor(study.jobs) as pool:
        list(pool.map(execute, first))
        list(pool.map(execute, [run_job(study, base, run) for run in needs_pretraining]))

    for run in runs:
        run |= collect_run(study.out / run_name(run))
    text = json.dumps(runs, indent=1).encode()
    write_atomic(study.out / "runs.json", lambda file: file.write(text))
    seeds = study.pretrain_seeds if needs_pretraining else None
    page = study_markdown(runs, study.arms, settings, seeds, command_line(study), study.against)
    write_atomic(study.out / "results.md", lambda file: file.write(page.encode()))
    print(page)
    if study.trainer == "pdcr" and importlib.util.find_spec("matplotlib") is not None:
        from medcl_train.report.pdcr import compare_features

        for n, _ in plan:  # the features of the first draw, arm beside arm
            names = {arm: run_name({"arm": arm, "labeled": n, "draw": 0}) for arm in study.arms}
            picture = study.out / run_name({"arm": "features", "labeled": n, "draw": 0})
            folders = {arm: study.out / name for arm, name in names.items()}
            compare_features(folders, data_root(study, settings), picture.with_suffix(".png"))


def parse_draws(draws):
    """["8@1", "4@25%"] -> [(labelled subjects, number of draws), ...]; shares stay text."""
    plan = []
    for text in draws:
        count, _, labeled = text.partition("@")
        number = labeled.removesuffix("%")
        if not (count.isdigit() and number.isdigit() and int(count) and int(number)):
            raise ConfigError(f"--draws takes COUNT@LABELED such as 8@1 or 4@25%, got {text!r}")
        plan.append((int(labeled) if labeled == number else labeled, int(count)))
    return plan


def data_root(study, settings):
    shared = shared_data_root()
    if study.data_root is None and settings.dataset in SHARED and shared is not None:
        return shared / SHARED[settings.dataset]
    root = study.data_root or settings.data_root
    if root is None:
        raise ConfigError("give --data-root, the folder of the data (or set MEDCL_DATA)")
    return root


def run_name(run):
    return f"{run['arm']}-n{run['labeled']}-draw{run['draw']}".replace("%", "pc")


def pretraining_job(study, base, run):
    """(folder, file that says it is finished, command). Arms that pre-train alike share it."""
    seed, arm = run["pretrain_seed"], ARMS[study.trainer][run["arm"]]
    own = []  # what an arm changes in the contrast
    if study.trainer == "gcl":
        own = [word for word in arm if word not in FROM_PRETRAINED]
    name = f"pretraining-{run['arm'] + '-' if own else ''}{seed}"
    command = [*base, "--exp", name, "--seed", str(seed), "--max-iterations", "0", *own]
    return study.out / name, study.out / name / "checkpoints" / "pretrain.pt", command


def run_job(study, base, run):
    name, arm = run_name(run), ARMS[study.trainer][run["arm"]]
    if PRETRAINED in arm:
        checkpoint = pretraining_job(study, base, run)[1]
        arm = [str(checkpoint) if word == PRETRAINED else word for word in arm]
    labeled = ["--labeled-num", str(run["labeled"])]
    if isinstance(run["labeled"], str):
        labeled = ["--labeled-fraction", str(int(run["labeled"].removesuffix("%")) / 100)]
    elif study.trainer == "pdcr":  # a number replaces the config file's share
        labeled += ["--labeled-fraction", "None"]
    draw = [*labeled, "--draw", str(run["draw"])]
    command = [*base, "--exp", name, "--seed", str(1000 + run["draw"]), *draw, *arm]
    return study.out / name, study.out / name / "summary.json", command


def execute(job):
    """Run one job unless it is finished; its output goes to <folder>/console.txt."""
    folder, finished, command = job
    if finished.is_file():
        print(f"{folder.name}: finished before", flush=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(folder / "console.txt", "w", encoding="utf-8") as console:
        code = subprocess.run(
            command, stdout=console, stderr=subprocess.STDOUT, env=environment
        ).returncode
    if code or not finished.is_file():
        tail = (folder / "console.txt").read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise ConfigError(f"{folder.name} ended with code {code}: {' '.join(tail)}")
    print(f"{folder.name}: {time.perf_counter() - start:.0f} s", flush=True)


def command_line(study):
    """The command that makes this study again, without folders of this machine."""
    words = ["python python/compare.py"]
    words += [] if study.trainer == "ideal" else ["--trainer", study.trainer]
    words += [f"--config python/configs/{study.config.name}"]
    words += ["--data-root DIR", "--draws", *study.draws, "--arms", *study.arms]
    if study.against:
        words += ["--against", *study.against]
    if study.trainer != "pdcr":
        words += ["--pretrain-seeds", str(study.pretrain_seeds)]
    if study.options:
        words.append(f'--options="{study.options}"')
    return " ".join(words)


if __name__ == "__main__":
    exit_with_one_line(main)
