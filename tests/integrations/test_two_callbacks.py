"""Two callbacks in one Trainer, each for other tensors: a GAN, or Muon beside AdamW."""

import lightning.pytorch as lightning
import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as loss_of
from transformers import Trainer, TrainingArguments

import parasparse as ps
from parasparse.integrations.lightning import Sparsity
from parasparse.integrations.transformers import SparsityCallback
from tests.integrations.test_lightning import assert_equal, data, first_of, state_of, trainer

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own, on tiny runs


class Twins(nn.Module):
    """Two weights of one shape: a swap of the states of an optimizer has no other sign."""

    def __init__(self):
        super().__init__()
        self.weight_one, self.weight_two = (nn.Parameter(torch.randn(8, 8) / 3) for _ in range(2))

    def forward(self, x):
        return (x @ self.weight_one).relu() @ self.weight_two


class Gan(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.g, self.d = Twins(), Twins()

    def training_step(self, batch, index):
        real = batch[0]
        for number, optimizer in enumerate(self.optimizers()):
            made = self.d(self.g(real.flip(1))).mean(1)
            losses = [loss_of(made, torch.ones_like(made)), loss_of(made, torch.zeros_like(made))]
            optimizer.zero_grad()
            losses[number].backward()
            optimizer.step()

    def configure_optimizers(self):
        parts = (self.g, self.d)
        return [torch.optim.Adam(part.parameters(), 1e-2) for part in parts]


def gradual(name, number):
    def factory(module, *optimizers):
        schedule = ps.schedules.Cubic(0.0, 1.0, stop=12)
        return ps.GradualPruning(
            module, {f"{name}.weight_one": 0.5}, optimizers[number], schedule=schedule, every=3
        )

    return factory


def momentum(name, number):
    def factory(module, *optimizers):
        torch.manual_seed(3)  # the first masks are drawn
        rules = {f"{name}.weight_one": 0.75}  # beside a dense weight of this shape
        return ps.sparse_momentum(module, rules, optimizers[number], stop=100, every=3)

    return factory


def callbacks():
    return [Sparsity(gradual("g", 0)), Sparsity(momentum("d", 1))]


def test_each_has_a_state_of_its_own(tmp_path):
    straight, whole = Gan(), callbacks()
    trainer(whole, tmp_path, max_epochs=3).fit(straight, data())
    assert [callback.controller.steps for callback in whole] == [24, 24]  # one a batch

    resumed, path = Gan(), None
    for epochs in (1, 2, 3):  # the second checkpoint is of optimizers made after the masks
        second = callbacks()
        run = trainer(second, tmp_path, max_epochs=epochs)
        run.fit(resumed, data(), ckpt_path=path)
        path = first_of(tmp_path)
        run.save_checkpoint(path)
        resumed = resumed if epochs == 3 else Gan()
    assert_equal(state_of(resumed), state_of(straight))
    for one, two in zip(whole, second, strict=True):
        assert one.controller.history == two.controller.history


def test_each_logs_its_own_sparsity(tmp_path):
    run = trainer(callbacks(), tmp_path)
    run.fit(Gan(), data())
    metrics = {name: float(value) for name, value in run.callback_metrics.items()}
    assert metrics["sparsity/total"] == pytest.approx(0.5, abs=0.01)
    assert metrics["sparsity-1/total"] == pytest.approx(0.75, abs=0.01)


def test_one_callback_over_both_optimizers(tmp_path):
    def factory(module, *optimizers):
        schedule = ps.schedules.Cubic(0.0, 1.0, stop=12)
        return ps.GradualPruning(
            module, {"?.weight_one": 0.5}, optimizers, schedule=schedule, every=3
        )

    alone, net = Sparsity(factory), Gan()
    trainer([alone], tmp_path).fit(net, data())
    both = Gan()
    trainer([Sparsity(gradual("g", 0)), Sparsity(gradual("d", 1))], tmp_path).fit(both, data())
    assert_equal(state_of(net), state_of(both))


def test_callbacks_go_on_in_a_new_trainer(tmp_path):
    used = callbacks()
    for _ in range(2):  # folds of a cross-validation
        net = Gan()
        trainer(used, tmp_path, max_epochs=1).fit(net, data())
        assert [callback.controller.steps for callback in used] == [8, 8]


class Chain(nn.Module):
    """In the form that the Trainer of Hugging Face wants."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.g, self.d = Twins(), Twins()

    def forward(self, x, labels=None):
        return {"loss": (self.g(self.d(x)) - x).square().mean(), "logits": x}


def rows():
    x = torch.randn(48, 8, generator=torch.Generator().manual_seed(1))
    return [{"x": row, "labels": row} for row in x]


PAIR = [gradual("g", 0), momentum("d", 0)]


def trained(folder, resume=None, factories=PAIR):
    used = [SparsityCallback(factory) for factory in factories]
    options = TrainingArguments(
        str(folder), per_device_train_batch_size=4, num_train_epochs=1, use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="steps", save_steps=4, logging_strategy="no", seed=0,
    )  # fmt: skip
    run = Trainer(Chain(), options, train_dataset=rows(), callbacks=used)
    run.train(resume_from_checkpoint=resume)
    return run.model, [callback.controller for callback in used]


def test_two_callbacks_of_transformers(tmp_path):
    straight, whole = trained(tmp_path)
    for step in (4, 8):  # the second checkpoint is of an optimizer made after the masks
        resumed, controllers = trained(tmp_path, resume=str(tmp_path / f"checkpoint-{step}"))
        assert_equal(state_of(resumed), state_of(straight))
        assert [each.history for each in controllers] == [each.history for each in whole]


def test_what_an_earlier_run_has_left_in_the_folder_is_ignored(tmp_path):
    trained(tmp_path, factories=[momentum("g", 0), gradual("d", 0)])
    straight, _ = trained(tmp_path)
    resumed, _ = trained(tmp_path, resume=str(tmp_path / "checkpoint-8"))
    assert_equal(state_of(resumed), state_of(straight))
