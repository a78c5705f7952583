#!/usr/bin/env python3
"""GCL: contrast by several meta labels with filtered and mitigated gradients (arXiv 2309.08888).

    python python/train_gcl.py --config python/configs/gcl_demo.yaml
    python python/train_gcl.py --config python/configs/gcl_acdc.yaml --data-root ACDC/training
    python python/train_gcl.py --help

Stage 1 trains a U-Net encoder without masks: slices that share a meta label (slice position,
patient, cardiac phase, ...) attract each other, as images and pixel by pixel. The Gradient Filter
keeps the pixel pairs with the largest gradients, the Gradient Mitigator removes what the meta
labels' gradients contradict each other in. Stage 2 trains the U-Net on few labelled slices. Of the
paper only the idea is known; the settings name every reading (docs/gcl.md).
"""

from functools import partial

import torch

from medcl_train import gcl
from medcl_train.conclusion import conclude
from medcl_train.data.augment import STRENGTHS, augment, view
from medcl_train.engine.config import format_config, parse_config
from medcl_train.engine.loop import Loop, Stage
from medcl_train.engine.profiling import profile
from medcl_train.engine.runs import exit_with_one_line, run_seeds
from medcl_train.engine.seeding import generator
from medcl_train.evaluation import quick_dice
from medcl_train.ideal.consistency import supervised_loss
from medcl_train.training_data import load_data, with_task


class Pretraining(Stage):
    """Stage 1: all training slices and their meta labels, no masks."""

    name = "pretrain"

    def __init__(self, config, data, device):
        self.config, self.data, self.device = config, data, device
        self.iterations = config.pretrain_iterations
        self.labels = gcl.meta_labels(
            data.pool,
            config.perspective_names,
            threshold=config.threshold,
            parts=config.slice_parts,
        )
        self.batches = gcl.batches(config, self.labels)
        self.network = gcl.build_contrast(config, data.num_classes, device)
        self.contrast = gcl.Contrast(config, self.network).to(device)
        self.mitigator = gcl.Mitigator(config)
        self.modules = {"network": self.network, "contrast": self.contrast}
        self.optimizer, self.schedule = gcl.pretraining_optimizer(config, self.network)

    def step(self, iteration):
        config = self.config
        batch = self.batches.at(iteration)  # every perspective has positives in it
        slices = self.data.images(batch, self.device)  # (B, 1, H, W)
        labels = self.labels.batch(batch, self.device)  # of both views
        rng = generator(config.seed, "views", iteration)
        views, geometry = view(torch.cat([slices, slices]), config.view_augmentation, rng)

        found = self.network(views)  # projections of images and of pixels
        branches = self.contrast.branches(found, labels, geometry, iteration)
        loss, logged = self.mitigator(
            branches, self.network.shared_parameters, self.network.head_parameters, iteration
        )
        if config.log_selection:
            logged |= gcl.selection_log(branches)
        self.contrast.remember(self.network, views, labels)
        return dict.fromkeys(gcl.log_names(config), float("nan")) | logged | {"loss": loss}


class Finetuning(Stage):
    """Stage 2: the U-Net on the labelled slices."""

    name = "finetune"

    def __init__(self, config, data, device):
        self.config, self.data, self.device = config, data, device
        self.iterations = config.max_iterations
        self.batches = data.sampler(config.batch_size, 0, config.seed)
        self.net = gcl.build_network(config, data.num_classes, device)
        self.modules = {"segmenter": self.net}
        self.optimizer, self.schedule = gcl.finetuning_optimizer(config, self.net)
        self.supervised_loss = partial(supervised_loss, **config.supervised_options)

    def step(self, iteration):
        batch = self.batches.batch(iteration)
        y, missing = self.data.labels(batch, self.device)
        rng = generator(self.config.seed, "augment-labeled", iteration)
        x = self.data.images(batch, self.device)
        x, y = augment(x, y, STRENGTHS[self.config.augment], rng)
        (logits,) = self.net(x)
        return {"loss": self.supervised_loss(logits, y, missing=missing)}

    def validate(self):
        if not self.data.val:
            return None
        dice = quick_dice(self.net, self.data.val, head=self.config.head, device=self.device)
        return {"val_mean_dice": dice}


def train(config, folder):
    """Both stages, then test scores and the report in `folder`; returns the test summary."""
    loop = Loop(config, folder)
    data = load_data(config, loop.log.info)
    tuning = Finetuning(config, data, loop.device)
    if config.pretrains and not loop.passed(Pretraining.name):
        pretraining = Pretraining(config, data, loop.device)
        group = 1 + len(pretraining.labels.names)
        if config.sampler == "grouped" and config.pretrain_batch_size < group:
            loop.log.info(
                f"warning: pretrain_batch_size {config.pretrain_batch_size} holds no whole group: "
                f"a slice and a positive per perspective ({group}): some perspectives have only a "
                "slice's own other view as positive"
            )
        loop.run(pretraining)
        gcl.take_weights(tuning.net, pretraining.network.state_dict())
    elif config.pretrained:
        gcl.load_pretrained(config, tuning.net)
    loop.run(tuning)
    return conclude(config, loop, tuning.net, data, gcl.pictures)


def main():
    config = with_task(parse_config(gcl.GclConfig))
    if config.dry_run:
        print(format_config(config))
    elif config.profile_steps:
        profile(config, [Pretraining])  # fine-tuning uses no contrastive kernel
    else:
        run_seeds(config, train)


if __name__ == "__main__":
    exit_with_one_line(main)
