"""The callback with the real Trainer of Lightning."""

import copy
import importlib
import sys
from pathlib import Path

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

import parasparse as ps
from parasparse.integrations.lightning import Sparsity


class Net(lightning.LightningModule):
    def __init__(self, gates=False):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
        self.cs = None
        if gates:
            self.cs = ps.ContinuousSparsification(
                self, {"body.*": ps.Gate(init=0.1)}, final_temperature=50.0, steps=8
            )

    def training_step(self, batch, index):
        x, y = batch
        return nn.functional.cross_entropy(self.body(x), y)

    def test_step(self, batch, index):
        x, _ = batch
        self.log("zeros", float((self.body[0].weight == 0).float().mean()))
        return self.body(x).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 8, generator=generator)
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, x[:, :4].argmax(1)), batch_size=8
    )


def gradual(module, optimizer):
    schedule = ps.schedules.Cubic(0.0, 1.0, stop=12)
    return ps.GradualPruning(module, 0.8, optimizer, schedule=schedule, every=3)


def rigl(module, optimizer):
    return ps.rigl(module, {nn.Linear: 0.8}, optimizer, stop=100, every=3)


def momentum(module, optimizer):
    return ps.sparse_momentum(module, {nn.Linear: 0.8}, optimizer, stop=100, every=3)


def trainer(callbacks, folder, **options):
    options = {
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "devices": 1,
        **options,
    }
    return lightning.Trainer(
        callbacks=callbacks, default_root_dir=folder, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip


def first_of(folder):
    return folder / "first.ckpt"


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_equal(one, two):
    assert one.keys() == two.keys()
    for key in one:
        assert torch.equal(one[key], two[key]), key


pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, on how small our runs are
FACTORIES = [gradual, rigl, momentum]


def seeded(factory):
    """First masks are drawn: the same ones wherever this is called."""

    def make(module, optimizer):
        torch.manual_seed(5)
        return factory(module, optimizer)

    return make


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("factory", FACTORIES)
def test_it_does_what_a_loop_by_hand_does(factory, accumulate, tmp_path):
    net, callback = Net(), Sparsity(seeded(factory))
    trainer([callback], tmp_path, accumulate_grad_batches=accumulate).fit(net, data())

    by_hand = Net()
    optimizer = by_hand.configure_optimizers()
    controller = seeded(factory)(by_hand, optimizer)
    for _ in range(2):
        for number, batch in enumerate(data(), start=1):
            (by_hand.training_step(batch, 0) / accumulate).backward()
            if number % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                controller.step()
    assert_equal(state_of(net), state_of(by_hand))
    assert callback.controller.history == controller.history
    assert callback.controller.steps == 16 // accumulate


@pytest.mark.parametrize("factory", FACTORIES)
def test_a_run_that_goes_on_from_a_checkpoint_ends_bit_for_bit_alike(factory, tmp_path):
    straight, whole = Net(), Sparsity(seeded(factory))
    trainer([whole], tmp_path, max_epochs=3).fit(straight, data())

    first = trainer([Sparsity(seeded(factory))], tmp_path, max_epochs=1)
    first.fit(Net(), data())
    first.save_checkpoint(first_of(tmp_path))
    resumed, callback = Net(), Sparsity(factory)  # other masks, were they not loaded
    trainer([callback], tmp_path, max_epochs=3).fit(resumed, data(), ckpt_path=first_of(tmp_path))
    assert_equal(state_of(resumed), state_of(straight))
    assert callback.controller.history == whole.controller.history


@pytest.mark.parametrize("factory", FACTORIES)
def test_a_further_fit_goes_on(factory, tmp_path):
    straight, whole = Net(), Sparsity(seeded(factory))
    trainer([whole], tmp_path, max_epochs=2).fit(straight, data())

    net, callback = Net(), Sparsity(seeded(factory))
    run = trainer([callback], tmp_path, max_epochs=1)
    run.fit(net, data())
    masks = {name: mask.clone() for name, mask in ps.named_masks(net)}
    run.fit_loop.max_epochs = 1  # nothing to train: only the controller is made anew
    run.fit(net, data())
    assert all(torch.equal(mask, masks[name]) for name, mask in ps.named_masks(net))
    assert callback.controller.steps == 8
    run.fit_loop.max_epochs = 2
    run.fit(net, data())
    assert callback.controller.steps == 16
    assert [u.step for u in callback.controller.history] == [
        u.step for u in whole.controller.history
    ]


def test_a_checkpoint_loads_into_the_model_that_wrote_it(tmp_path):
    net, callback = Net(), Sparsity(momentum)
    run = trainer([callback], tmp_path, max_epochs=1)
    run.fit(net, data())
    run.save_checkpoint(first_of(tmp_path))
    before = state_of(net)
    with torch.no_grad():
        ps.stored(net, "body.0.weight").add_(1.0)
    run = trainer([other := Sparsity(momentum)], tmp_path, max_epochs=1)
    run.fit(net, data(), ckpt_path=first_of(tmp_path))  # no epoch left
    assert_equal(state_of(net), before)
    assert other.controller.steps == 8


def test_a_dense_model_is_tested_with_the_masks_of_a_checkpoint(tmp_path):
    net = Net()
    run = trainer([Sparsity(gradual)], tmp_path)
    run.fit(net, data())
    run.save_checkpoint(first_of(tmp_path))
    fresh = Net()
    results = trainer([Sparsity(gradual)], tmp_path).test(
        fresh, data(), ckpt_path=first_of(tmp_path), verbose=False
    )
    assert results[0]["zeros"] == pytest.approx(0.8, abs=0.01)
    assert_equal(state_of(fresh), state_of(net))

    elsewhere = Net()
    ps.load_state_dict(elsewhere, torch.load(first_of(tmp_path))["state_dict"])
    assert_equal(state_of(elsewhere), state_of(net))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run = trainer([Sparsity(gradual)], tmp_path, max_epochs=1)
    run.fit(Net(), data())
    run.save_checkpoint(first_of(tmp_path))
    other = Net()
    other.body[3] = nn.Linear(32, 5)
    with pytest.raises(RuntimeError, match="size mismatch"):
        trainer([Sparsity(gradual)], tmp_path).fit(other, data(), ckpt_path=first_of(tmp_path))


def test_gates_that_the_module_makes_train(tmp_path):
    net, callback = Net(gates=True), Sparsity(lambda module, optimizer: module.cs)
    run = trainer([callback], tmp_path, max_epochs=1)
    run.fit(net, data())
    assert net.cs.temperature == pytest.approx(50.0)
    run.save_checkpoint(first_of(tmp_path))
    again = Net(gates=True)
    other = Sparsity(lambda module, optimizer: module.cs)
    trainer([other], tmp_path, max_epochs=1).fit(again, data(), ckpt_path=first_of(tmp_path))
    assert_equal(state_of(again), state_of(net))
    assert again.cs.step_in_round == 8


def test_loggers_and_other_callbacks_get_what_the_last_update_was(tmp_path):
    logger = CSVLogger(tmp_path)
    callback = Sparsity(gradual)
    run = trainer([callback], tmp_path, logger=logger, log_every_n_steps=1)
    run.fit(Net(), data())
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    head = rows[0].split(",")
    logged = [dict(zip(head, row.split(","), strict=True)) for row in rows[1:]]
    history = {update.step: update for update in callback.controller.history}
    last = None
    for step, row in zip(range(3, 17), logged, strict=True):  # nothing before the first update
        last = history.get(step, last)
        assert int(row["step"]) == step - 1
        assert float(row["sparsity/total"]) == pytest.approx(last.total)
        assert float(row["sparsity/churn"]) == pytest.approx(last.churn)
    assert float(run.callback_metrics["sparsity/total"]) == pytest.approx(0.8, abs=0.01)


def test_another_module_starts_anew(tmp_path):
    callback = Sparsity(gradual)
    for _ in range(2):  # folds of a cross-validation
        net = Net()
        trainer([callback], tmp_path).fit(net, data())
        assert ps.summary(net).masked.sparsity == pytest.approx(0.8, abs=0.01)
        assert callback.controller.steps == 16


def test_a_module_that_was_squashed_starts_anew(tmp_path):
    callback, net = Sparsity(gradual), Net()
    trainer([callback], tmp_path).fit(net, data())
    ps.squash(net)
    trainer([callback], tmp_path).fit(net, data())
    assert ps.summary(net).masked.sparsity == pytest.approx(0.8, abs=0.01)


class Twins(lightning.LightningModule):
    """Two weights of one shape in one module: a swap of their states has no other sign."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight_one, self.weight_two = (nn.Parameter(torch.randn(8, 8) / 3) for _ in range(2))

    def training_step(self, batch, index):
        x, y = batch
        return nn.functional.cross_entropy((x @ self.weight_one).relu() @ self.weight_two, y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def first_alone(module, optimizer):
    schedule = ps.schedules.Cubic(0.0, 1.0, stop=12)
    rules = {"weight_one": 0.5}
    return ps.GradualPruning(module, rules, optimizer, schedule=schedule, every=3)


@pytest.mark.parametrize("same", [True, False], ids=["the same module", "a fresh module"])
@pytest.mark.parametrize(("build", "factory"), [(Twins, first_alone), (Net, momentum)])
def test_each_weight_gets_its_own_state_of_the_optimizer(build, factory, same, tmp_path):
    straight = build()
    trainer([Sparsity(seeded(factory))], tmp_path, max_epochs=4).fit(straight, data())

    net = build()
    for epochs in (1, 3):  # the second checkpoint is of an optimizer that was made after the masks
        path = first_of(tmp_path) if epochs > 1 else None
        run = trainer([Sparsity(seeded(factory))], tmp_path, max_epochs=epochs)
        run.fit(net, data(), ckpt_path=path)
        run.save_checkpoint(first_of(tmp_path))
        net = net if same else build()
    trainer([Sparsity(seeded(factory))], tmp_path, max_epochs=4).fit(
        net, data(), ckpt_path=first_of(tmp_path)
    )
    assert_equal(state_of(net), state_of(straight))


def test_a_checkpoint_of_another_controller_is_refused(tmp_path):
    run = trainer([Sparsity(gradual)], tmp_path, max_epochs=1)
    run.fit(Net(), data())
    run.save_checkpoint(first_of(tmp_path))
    with pytest.raises(RuntimeError, match="GradualPruning; it made DynamicSparsity"):
        trainer([Sparsity(momentum)], tmp_path).fit(Net(), data(), ckpt_path=first_of(tmp_path))


@pytest.mark.parametrize("name", ["StochasticWeightAveraging", "WeightAveraging"])
def test_averages_of_weights_are_refused(name, tmp_path):
    if not hasattr(lightning.callbacks, name):
        pytest.skip("this Lightning has no such callback")
    averaging = getattr(lightning.callbacks, name)
    averaging = averaging(1e-2) if name.startswith("Stochastic") else averaging()
    with pytest.raises(RuntimeError, match="average dense weights"):
        trainer([Sparsity(gradual), averaging], tmp_path).fit(Net(), data())


def test_nothing_is_left_on_the_module(tmp_path):
    class Broken(Net):
        def configure_optimizers(self):
            raise ArithmeticError

    masked = ps.sparsify(Net(), 0.5).state_dict()
    broken, trained = Broken(), Net()
    with pytest.raises(ArithmeticError):
        trainer([Sparsity(rigl)], tmp_path).fit(broken, data())
    trainer([Sparsity(rigl)], tmp_path).fit(trained, data())
    for net in (broken, ps.squash(trained)):
        with pytest.raises(RuntimeError, match="Unexpected key"):
            net.load_state_dict(masked)
    ps.rigl(trained, {"body.*": 0.5}, torch.optim.SGD(trained.parameters(), 0.1), stop=5, every=1)


def test_the_squashed_module_is_what_it_was(tmp_path):
    net = Net()
    keys = list(net.state_dict())
    trainer([Sparsity(gradual)], tmp_path).fit(net, data())
    copied = copy.deepcopy(net)
    ps.squash(net)
    assert list(net.state_dict()) == keys
    assert type(net.body[0]) is nn.Linear
    x = torch.randn(4, 8)
    assert torch.equal(net.eval().body(x), copied.eval().body(x))


def test_a_controller_is_no_factory():
    pruner = ps.GradualPruning(Net(), 0.5, schedule=ps.schedules.Constant(1.0), every=1)
    with pytest.raises(TypeError, match="`factory` must be a function"):
        Sparsity(pruner)


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_without_its_library_the_error_says_what_brings_it(name, monkeypatch):
    monkeypatch.setitem(sys.modules, {"lightning": "lightning.pytorch"}.get(name, name), None)
    monkeypatch.delitem(sys.modules, f"parasparse.integrations.{name}", raising=False)
    with pytest.raises(ImportError) as raised:
        importlib.import_module(f"parasparse.integrations.{name}")
    assert f'pip install "parasparse[{name}]"' in raised.value.__notes__[0]


class Shrinks(lightning.Callback):
    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == 1:
            ps.shrink(module.body, torch.randn(2, 8), optimizer=trainer.optimizers)


def test_training_goes_on_after_shrink(tmp_path):
    module = Net()
    ps.sparsify(module, {"body.0": ps.Prune(0.5, pattern=ps.patterns.channel(0))})
    trainer = lightning.Trainer(
        max_epochs=3, callbacks=[Shrinks()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(module, data())
    assert module.body[0].out_features < 32
    for parameter, state in trainer.optimizers[0].state.items():
        assert state["momentum_buffer"].shape == parameter.shape


def test_compact_weights_train_and_resume(tmp_path):
    def compact():
        return ps.compact(ps.sparsify(Net(), {"body.0": 0.5}))

    module, resumed = compact(), compact()
    whole = trainer([], tmp_path / "whole", max_epochs=2)
    whole.fit(module, data())
    half = trainer([], tmp_path / "half", max_epochs=1)
    half.fit(compact(), data())
    half.save_checkpoint(tmp_path / "half.ckpt")
    trainer([], tmp_path, max_epochs=2).fit(resumed, data(), ckpt_path=tmp_path / "half.ckpt")
    assert resumed.body[0].parametrizations.weight.original.shape == (128,)
    assert_equal(state_of(resumed), state_of(module))
