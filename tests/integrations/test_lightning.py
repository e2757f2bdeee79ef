"""The callback with the real Trainer of Lightning."""

import copy

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


def test_loggers_get_the_updates(tmp_path):
    logger = CSVLogger(tmp_path)
    callback = Sparsity(gradual)
    trainer([callback], tmp_path, logger=logger).fit(Net(), data())
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    head = rows[0].split(",")
    logged = [dict(zip(head, row.split(","), strict=True)) for row in rows[1:]]
    assert [int(row["step"]) for row in logged] == [3, 6, 9, 12]
    totals = [update.total for update in callback.controller.history]
    assert [float(row["sparsity/total"]) for row in logged] == pytest.approx(totals)
    assert totals[-1] == pytest.approx(0.8, abs=0.01)


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
