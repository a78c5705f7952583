#!/usr/bin/env python3
"""PDCR and UAFS: patch-affinity contrast and uncertain features turned down (arXiv 2201.08779).

    python python/train_pdcr.py --config python/configs/pdcr_demo.yaml
    python python/train_pdcr.py --config python/configs/pdcr_isic.yaml --data-root ISIC
    python python/train_pdcr.py --config python/configs/pdcr_hippocampus.yaml --data-root Task04
    python python/train_pdcr.py --help

Supervised training of DeepLabV3+ or a U-Net on photographs, or of a 3-D U-Net on volumes. PDCR adds
a loss on feature cells inside the network: the class shares of the patches around two cells say how
similar their features should be. UAFS adds blocks behind layers: each weighs its features by the
certainty of a small classifier of its own. The paper leaves points open and its code has mistakes;
the settings name every reading (docs/pdcr.md).
"""

from functools import partial

from medcl_train import pdcr
from medcl_train.conclusion import conclude
from medcl_train.engine.config import format_config, parse_config
from medcl_train.engine.loop import Loop, Stage
from medcl_train.engine.profiling import profile
from medcl_train.engine.runs import exit_with_one_line, run_seeds
from medcl_train.engine.seeding import generator
from medcl_train.evaluation import quick_dice
from medcl_train.ideal.consistency import supervised_loss
from medcl_train.models import deep_supervision_loss
from medcl_train.training_data import with_task


class Training(Stage):
    """The only stage: labelled images, with the parts of the method."""

    name = "train"

    def __init__(self, config, data, device):
        self.config, self.data, self.device = config, data, device
        self.iterations = config.max_iterations
        self.batches = data.sampler(config.batch_size, config.seed)
        self.net = pdcr.build_network(config, data.num_classes, device)
        self.modules = {"segmenter": self.net}
        self.contrast = None
        if config.uses_pdcr:
            self.contrast = pdcr.Contrast(config, self.net, data.num_classes)
            self.modules["contrast"] = self.contrast  # its adapters are trained too
        self.optimizer, self.schedule = pdcr.build_training(config, self.modules.values())
        # cross-entropy plus Dice, not their mean
        self.scale = 2.0 if config.dice else 1.0

    def step(self, iteration):
        rng = generator(self.config.seed, "batch", iteration)
        x, y, missing = self.data.batch(self.batches.batch(iteration), rng, self.device)
        taps = self.contrast.taps if self.contrast is not None else ()
        with pdcr.Taps(self.net, taps) as tapped:
            outputs = self.net(x)  # logits, finest first
        loss = partial(supervised_loss, missing=missing, **self.config.supervised_options)
        supervised = self.scale * deep_supervision_loss(outputs, y, loss)
        if self.contrast is None:
            return {"loss": supervised}
        found = self.contrast(tapped.features, y)
        total = supervised + found.pop("loss_pdcr")
        return {"loss": total, "loss_supervised": supervised, **found}

    def validate(self):
        if not self.data.val:
            return None
        options = {"head": self.config.head, "device": self.device, "predict": self.data.predict}
        return {"val_mean_dice": quick_dice(self.net, self.data.val, **options)}


def train(config, folder):
    """Train, then test scores and the report in `folder`; returns the test summary."""
    loop = Loop(config, folder)
    data = pdcr.load_data(config, loop.log.info)
    training = Training(config, data, loop.device)
    loop.run(training)
    return conclude(config, loop, training.net, data, pdcr.pictures, data.evaluate)


def main():
    config = with_task(parse_config(pdcr.PdcrConfig))
    if config.dry_run:
        print(format_config(config))
    elif config.profile_steps:
        profile(config, [Training], pdcr.load_data)
    else:
        run_seeds(config, train)


if __name__ == "__main__":
    exit_with_one_line(main)
