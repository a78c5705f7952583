#!/usr/bin/env python3
"""IDEAL: dense local contrastive pre-training, then cross pseudo labels (arXiv 2210.15075).

    python python/train_ideal.py --config python/configs/ideal_demo.yaml
    python python/train_ideal.py --config python/configs/ideal_acdc.yaml --data-root ACDC/training
    python python/train_ideal.py --help

Stage 1 trains a U-Net encoder without labels: two views of a slice, a dense projection of each;
every pixel of one view is pulled to its match in the other and pushed from the other pixels.
Stage 2 adds two different decoders and trains on few labelled slices, while on unlabelled slices
each decoder learns from the other's confident pixels. The paper leaves many points open; the
settings say which readings exist (`--help`), the README which are defaults.
"""

from functools import partial

import torch

from medcl_train import ideal
from medcl_train.conclusion import conclude
from medcl_train.data.augment import STRENGTHS, augment, view
from medcl_train.engine.config import format_config, parse_config
from medcl_train.engine.loop import Loop, Stage
from medcl_train.engine.profiling import profile
from medcl_train.engine.runs import exit_with_one_line, run_seeds
from medcl_train.engine.seeding import IndexStream, generator
from medcl_train.evaluation import quick_dice
from medcl_train.training_data import load_data, with_task


class Pretraining(Stage):
    """Stage 1: all training slices, no labels."""

    name = "pretrain"

    def __init__(self, config, data, device):
        self.config, self.data, self.device = config, data, device
        self.iterations = config.pretrain_iterations
        self.batches = IndexStream(len(data.pool), config.pretrain_batch_size, config.seed)
        self.pair = ideal.build_pair(config, device)  # E_Q, G_Q and E_K, G_K
        self.contrast = ideal.ViewContrast(config).to(device)  # mk.info_nce, its queues
        self.modules = {"pair": self.pair, "contrast": self.contrast}
        self.optimizer, self.schedule = ideal.pretraining_optimizer(
            config, self.pair, self.contrast
        )

    def step(self, iteration):
        config = self.config
        slices = self.data.images(self.batches.at(iteration), self.device)  # (B, 1, H, W)
        rng = [generator(config.seed, f"views-{i}", iteration) for i in range(3)]
        view_q, geometry_q = view(slices, config.view_augmentation, rng[0])
        view_k, geometry_k = view(slices, config.view_augmentation, rng[1])

        self.pair.update_key(config.momentum)
        # per contrasted stride: encoder map (B, C, h, w) and projection (B, D, h, w)
        query, key = self.pair.query(view_q), self.pair.key(view_k)
        # for every query pixel: the pixel of the key view that shows the same place
        positives = [
            ideal.match_views(config, q, k, geometry_q, geometry_k, rng[2])
            for q, k in zip(query.levels, key.levels, strict=True)
        ]
        values = self.contrast(query, key, positives, iteration)
        self.contrast.enqueue(key)
        return values


class Finetuning(Stage):
    """Stage 2. With method=supervised: E and D1 on the labelled slices, all else equal."""

    name = "finetune"

    def __init__(self, config, data, device):
        self.config, self.data, self.device = config, data, device
        self.iterations = config.max_iterations
        self.batches = data.sampler(
            config.labeled_batch_size, config.unlabeled_batch_size, config.seed
        )
        self.net = ideal.build_network(config, data.num_classes, device)  # E, D1 (and D2)
        self.modules = {"segmenter": self.net}
        self.optimizer, self.schedule = ideal.finetuning_optimizer(config, self.net)
        self.supervised_loss = partial(ideal.supervised_loss, **config.supervised_options)

    def step(self, iteration):
        config, data = self.config, self.data
        batch = self.batches.batch(iteration)
        labeled, unlabeled = batch[: config.labeled_batch_size], batch[config.labeled_batch_size :]
        y, missing = data.labels(labeled, self.device)
        x, y = self.augmented(labeled, y, "labeled", iteration)
        if not unlabeled:
            outputs = self.outputs(x)
            return {"loss": sum(self.supervised_loss(z, y, missing=missing) for z in outputs)}
        u, _ = self.augmented(unlabeled, None, "unlabeled", iteration)
        if config.joint_batch:
            joint = self.outputs(torch.cat([x, u]))
            outputs, outputs_u = [z[: len(x)] for z in joint], [z[len(x) :] for z in joint]
        else:  # a pass each: BatchNorm does not mix labelled and unlabelled statistics
            outputs, outputs_u = self.outputs(x), self.outputs(u)

        loss = sum(self.supervised_loss(z, y, missing=missing) for z in outputs)
        if config.cross_on == "both":
            outputs_u = [torch.cat(pair) for pair in zip(outputs, outputs_u, strict=True)]
        cross, kept = ideal.cross_pseudo_loss(*outputs_u, **config.cross_options)
        weight = config.consistency_weight(iteration)
        logged = {"loss_supervised": loss, "loss_cross": cross, "kept": kept}
        return {"loss": loss + weight * cross, **logged, "consistency_weight": weight}

    def outputs(self, images):
        """Logits of D1 and D2, whose branch may see something else."""
        return self.net(images, *ideal.second_branch(self.config, images))

    def augmented(self, indices, labels, stream, iteration):
        rng = generator(self.config.seed, f"augment-{stream}", iteration)
        images = self.data.images(indices, self.device)
        return augment(images, labels, STRENGTHS[self.config.augment], rng)

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
        loop.run(pretraining)
        encoder = pretraining.pair.encoder(config.init_from)
        tuning.net.encoder.load_state_dict(encoder.state_dict())
    elif config.pretrained:
        ideal.load_pretrained(config, tuning.net)
    loop.run(tuning)
    return conclude(config, loop, tuning.net, data)


def main():
    config = with_task(parse_config(ideal.IdealConfig))
    if config.dry_run:
        print(format_config(config))
    elif config.profile_steps:
        profile(config, [Pretraining])  # fine-tuning uses no contrastive kernel
    else:
        run_seeds(config, train)


if __name__ == "__main__":
    exit_with_one_line(main)
