"""The end of a run: choose the weights, score the test subjects, write the report."""

from collections.abc import Callable

import torch
from torch import nn

from .engine.checkpoint import load_checkpoint
from .engine.loop import Loop
from .evaluation import evaluate
from .report import write_report
from .training_data import TrainingData, class_names


def conclude(
    config,
    loop: Loop,
    network: nn.Module,
    data: TrainingData,
    pictures=None,
    evaluate: Callable = evaluate,
) -> dict | None:
    """Evaluate `network` (or the best checkpoint, --select best) on the test subjects; write
    summary and report, with `pictures` of the method as `write_report` takes them. `evaluate` is
    called as `evaluation.evaluate` is.

    Returns the summary of `evaluate`, None without test subjects or without fine-tuning.
    """
    data.split.save(loop.folder / "split.json")
    if config.max_iterations == 0:  # pre-training only: there is no trained decoder to score
        loop.log.close()
        return None
    best = loop.checkpoints / "best.pt"
    if config.select == "best" and best.is_file():
        network.load_state_dict(load_checkpoint(best)["modules"]["segmenter"])
        loop.log.info(
            f"testing the weights of iteration {loop.best['iteration']}, best on the validation "
            "subjects"
        )
    summary, predictions = None, {}
    if data.test:
        summary, predictions = evaluate(
            network,
            data.test,
            loop.folder,
            class_names=class_names(config.dataset, data.num_classes, config.class_names),
            head=config.head,
            device=loop.device,
            definition=config.definition,
            empty=config.empty,
            unit=config.unit,
            say=loop.log.info,
        )
    if config.report:
        with torch.random.fork_rng(devices=[]):
            page = write_report(config, loop.folder, data, predictions, summary, pictures)
        loop.log.info(f"report: {page}")
    loop.log.close()
    return summary
