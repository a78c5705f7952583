"""The adapters inside the frameworks that they are for, where these are installed; the others with
a stand-in for the little that they use of it."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import medcl_kernels as medcl
from medcl_kernels.integrations import labels_at

HOSTS = {
    "monai": ("monai", ["monai.utils"]),
    "metric_learning": ("pytorch-metric-learning", ["pytorch_metric_learning.losses"]),
    "lightning": ("lightning", ["lightning.pytorch", "pytorch_lightning"]),
    "nnunet": ("nnunetv2", ["nnunetv2.training.nnUNetTrainer.nnUNetTrainer"]),
}


def installed(name: str) -> Any:
    """The framework, or a skipped test that says why."""
    return pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`adapter(name, host)` imports an integration anew, with `host` in place of its framework."""

    def imported(name: str, host: ModuleType | None) -> Any:
        for module in HOSTS[name][1]:
            monkeypatch.setitem(sys.modules, module, host)
            if host is not None:  # importing a.b imports a
                monkeypatch.setitem(sys.modules, module.split(".")[0], ModuleType("stand_in"))
        monkeypatch.delitem(sys.modules, f"medcl_kernels.integrations.{name}", raising=False)
        return importlib.import_module(f"medcl_kernels.integrations.{name}")

    yield imported
    for name in HOSTS:
        sys.modules.pop(f"medcl_kernels.integrations.{name}", None)


@pytest.mark.parametrize("name", HOSTS)
def test_without_its_framework_an_adapter_says_what_to_install(name, adapter):
    package, modules = HOSTS[name]
    with pytest.raises(ImportError, match=f"`pip install {package}`") as caught:
        adapter(name, None)
    assert all(module in str(caught.value) for module in modules)


def test_labels_come_at_the_resolution_of_the_features():
    features = torch.randn(2, 3, 2, 2)
    wanted = torch.arange(8).reshape(2, 2, 2)
    fine = wanted.repeat_interleave(3, 1).repeat_interleave(3, 2)
    for labels in (wanted, wanted.unsqueeze(1).float(), fine, fine.unsqueeze(1).double()):
        assert torch.equal(labels_at(features, labels), wanted)
    assert torch.equal(labels_at(torch.randn(4, 3), torch.arange(4.0)), torch.arange(4))
    with pytest.raises(ValueError, match="one-hot"):
        medcl.supervised_contrastive(features, labels_at(features, torch.zeros(2, 5, 2, 2)))


# ---- MONAI


def test_monai_contrastive_loss_can_be_swapped():
    losses = installed("monai.losses")
    from medcl_kernels.integrations.monai import MedCLLoss

    views = torch.randn(2, 7, 5, dtype=torch.float64)
    ours, theirs = views.clone().requires_grad_(), views.clone().requires_grad_()
    options = {"temperature": 0.5, "intra_view": True, "symmetric": True}
    value = MedCLLoss("info_nce", **options)(*ours)
    expected = losses.ContrastiveLoss()(*theirs)
    torch.testing.assert_close(value, expected)
    value.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_monai_tensors_enums_and_deep_supervision():
    monai = installed("monai")
    from medcl_kernels.integrations.monai import MedCLLoss

    features = torch.randn(2, 3, 4, 4, requires_grad=True)
    labels = torch.randint(0, 3, (2, 1, 8, 8))
    coarse = labels_at(features, labels)
    seen = monai.data.MetaTensor(features), monai.data.MetaTensor(labels.float())
    for reduction in ("mean", monai.utils.LossReduction.SUM, "none"):
        loss = MedCLLoss(temperature=0.2, reduction=reduction)(*seen)
        options = {"temperature": 0.2, "reduction": str(reduction)}
        assert torch.equal(loss, medcl.supervised_contrastive(features, coarse, **options))
        assert type(loss) is torch.Tensor
    loss.sum().backward()
    assert features.grad.abs().sum() > 0
    filtered = MedCLLoss("filtered_contrastive", keep=0.5)(*seen)
    assert torch.equal(filtered, medcl.filtered_contrastive(features, labels=coarse, keep=0.5))

    deep = monai.losses.DeepSupervisionLoss(MedCLLoss(), weights=[1.0, 0.5])
    maps = [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4)]
    expected = medcl.supervised_contrastive(maps[0], labels)
    expected = expected + 0.5 * medcl.supervised_contrastive(maps[1], coarse)
    torch.testing.assert_close(deep(maps, labels.float()), expected)
    with pytest.raises(ValueError, match="supervised_contrastive, filtered_contrastive, info_nce"):
        MedCLLoss("dice")
    with pytest.raises(ValueError, match="average"):
        MedCLLoss(reduction="average")


# ---- pytorch-metric-learning


def test_metric_learning_supcon_can_be_swapped():
    losses = installed("pytorch_metric_learning.losses")
    from pytorch_metric_learning.reducers import MeanReducer

    from medcl_kernels.integrations.metric_learning import MedCLLoss

    rows, labels = torch.randn(9, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 7])
    other = {"ref_emb": torch.randn(6, 5, dtype=torch.float64), "ref_labels": torch.arange(6) % 3}
    for kwargs in ({}, {"reducer": MeanReducer()}):
        for reference in ({}, other):
            found = []
            for kind in (MedCLLoss, losses.SupConLoss):
                leaf = rows.clone().requires_grad_()
                value = kind(temperature=0.2, **kwargs)(leaf, labels, **reference)
                value.backward()
                found.append((value.detach(), leaf.grad))
            for ours, theirs in zip(*found, strict=True):
                torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="miner"):
        MedCLLoss()(rows, labels, (torch.tensor([0]),) * 4)


# ---- Lightning


def test_lightning_step_returns_and_logs_the_loss(adapter):
    lightning = adapter("lightning", ModuleType("stand_in"))
    logged = []

    class Model(lightning.ContrastiveMixin):
        contrastive_loss = medcl.SupervisedContrastiveLoss(gather_distributed=True)

        def log(self, *args, **options):
            logged.append((*args, options))

    features, labels = torch.randn(2, 3, 4, 4, requires_grad=True), torch.arange(32) % 3
    labels = labels.reshape(2, 1, 4, 4)
    loss = Model().contrastive_step(features, labels, sync_dist=True)
    assert torch.equal(loss, medcl.supervised_contrastive(features, labels)) and loss.requires_grad
    ((name, value, options),) = logged
    assert name == "contrastive_loss" and torch.equal(value, loss) and not value.requires_grad
    assert options == {"batch_size": 2, "sync_dist": True}


def test_lightning_trains_with_the_mixin(tmp_path):
    pl = installed("lightning.pytorch")
    from medcl_kernels.integrations.lightning import ContrastiveMixin

    class Model(ContrastiveMixin, pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = torch.nn.Conv2d(1, 4, 1)
            self.contrastive_loss = medcl.SupervisedContrastiveLoss(gather_distributed=True)

        def training_step(self, batch, batch_idx):
            return self.contrastive_step(self.network(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    images = torch.randn(4, 1, 6, 6)
    data = torch.utils.data.TensorDataset(images, (images > 0).long())
    model = Model()
    before = model.network.weight.detach().clone()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=2))
    assert trainer.logged_metrics["contrastive_loss"] > 0
    assert not torch.equal(before, model.network.weight)


# ---- nnU-Net


class Network(torch.nn.Module):
    """Two decoder stages and the segmentation layer, under nnU-Net's names."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = torch.nn.Module()
        stages = torch.nn.Conv2d(1, 4, 1), torch.nn.Conv2d(4, 6, 1)
        self.decoder.stages = torch.nn.ModuleList(stages)
        self.decoder.last = torch.nn.Conv2d(6, 3, 1)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        for stage in self.decoder.stages:
            x = stage(x)
        return [self.decoder.last(x)]


class Trainer:
    """What `nnUNetTrainerMedCL` uses of nnU-Net's."""

    def __init__(self, **labels: Any) -> None:
        self.network, self.is_ddp, self.is_cascaded = Network(), False, False
        self.label_manager = SimpleNamespace(**{"has_regions": False, "ignore_label": 3, **labels})

    def _build_loss(self) -> Any:
        return lambda output, target: F.cross_entropy(output[0], target[0][:, 0], ignore_index=3)


def test_nnunet_trainer_adds_contrast_of_the_last_decoder_stage(adapter):
    host = ModuleType("stand_in")
    host.nnUNetTrainer = Trainer
    kind = adapter("nnunet", host).nnUNetTrainerMedCL
    trainer = kind()
    plain, loss = Trainer._build_loss(trainer), trainer._build_loss()
    images, target = torch.randn(2, 1, 4, 4), [torch.arange(32).reshape(2, 1, 4, 4) % 4]
    stages = trainer.network.decoder.stages

    output = trainer.network(images)
    features = stages[1](stages[0](images))
    contrast = medcl.supervised_contrastive(features, target[0], ignore_index=3)
    torch.testing.assert_close(loss(output, target), plain(output, target) + 0.1 * contrast)
    assert not trainer._do_i_compile()

    loss(trainer.network(images), target).backward()
    assert stages[0].weight.grad.abs().sum() > 0
    with torch.no_grad():  # validation
        output = trainer.network(images)
        assert torch.equal(loss(output, target), plain(output, target))
    nothing = [torch.full_like(target[0], 3)]
    trainer._build_loss = lambda: None
    loss.loss = lambda output, target: output[0].sum() * 0
    assert loss(trainer.network(images), nothing).item() == 0
    with pytest.raises(NotImplementedError, match="region-based"):
        kind(has_regions=True)._build_loss()


def test_nnunet_pixels_are_drawn_evenly_from_the_classes(adapter):
    host = ModuleType("stand_in")
    host.nnUNetTrainer = Trainer
    balanced = adapter("nnunet", host).balanced
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 3 + [9] * 7)[torch.randperm(80)]
    chosen = balanced(labels, 30, 9)
    assert labels[chosen].bincount().tolist() == [10, 10, 3]
    assert len(chosen.unique()) == 23 and torch.equal(chosen, chosen.sort().values)
    assert not torch.equal(chosen, balanced(labels, 30, 9))  # drawn anew
    assert labels[balanced(torch.full((5,), 9), 30, 9)].shape == (1,)


def test_nnunet_itself_takes_the_trainer():
    base = installed("nnunetv2.training.nnUNetTrainer.nnUNetTrainer").nnUNetTrainer
    from medcl_kernels.integrations.nnunet import nnUNetTrainerMedCL

    assert issubclass(nnUNetTrainerMedCL, base)
    for name in ("_build_loss", "_do_i_compile"):
        assert callable(getattr(base, name))
