"""The best checkpoint is as sparse as the last one, and schedules that do not end are told."""

import warnings

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import parasparse as ps
from parasparse.integrations.end_of_training import Sparsest
from parasparse.integrations.lightning import Sparsity
from parasparse.integrations.transformers import SparsityCallback
from tests.integrations.test_lightning import data, state_of, trainer
from tests.integrations.test_two_callbacks import Chain, rows


def pruning(stop, sparsity=0.8):
    def factory(module, optimizer):
        schedule = ps.schedules.Linear(0.0, 1.0, stop=stop)
        return ps.GradualPruning(module, {"*": sparsity}, optimizer, schedule=schedule, every=1)

    return factory


class Net(lightning.LightningModule):
    """Its metric, the lower the better, is worse where the network is sparser."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(8, 4)
        self.worse = 0

    def training_step(self, batch, index):
        x, y = batch
        return nn.functional.cross_entropy(self.body(x), y)

    def validation_step(self, batch, index):
        self.worse += 1e-3  # also with the number of steps
        self.log("quality", float((self.body.weight == 0).float().mean()) + self.worse)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def zeros_of(path):
    state = torch.load(path, weights_only=False)["state_dict"]
    return float((~state["body.parametrizations.weight.0.mask"]).float().mean())


def fitted(folder, stop, top, mode="min", epochs=4):
    best = ModelCheckpoint(folder, monitor="quality", mode=mode, save_top_k=top)
    run = trainer(
        [best, Sparsity(pruning(stop))], folder, max_epochs=epochs, enable_checkpointing=True
    )
    run.fit(Net(), data(), data())
    return best


QUIET = pytest.mark.filterwarnings(
    "error:training has ended", "error:the checkpoint that", "error:the best checkpoint",
)  # fmt: skip
OTHERS = pytest.mark.filterwarnings("ignore")  # the libraries' own, on tiny runs
pytestmark = [OTHERS]


@pytest.mark.parametrize("top", [1, 2, -1])
@pytest.mark.parametrize("stop", [8, 12, 24])
@QUIET
def test_the_best_checkpoint_of_lightning_is_as_sparse_as_the_last(top, stop, tmp_path):
    best = fitted(tmp_path, stop, top)
    assert zeros_of(best.best_model_path) == pytest.approx(0.8, abs=0.02)
    # The first one after the last update, because the metric gets worse.
    assert f"step={-(-stop // 8) * 8}" in best.best_model_path
    assert len(list(tmp_path.glob("*.ckpt"))) == (4 if top == -1 else top)


def test_without_a_later_checkpoint_lightning_keeps_the_best_and_it_is_told(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="quality", mode="min", every_n_train_steps=5)
    sparsity = Sparsity(pruning(12))
    run = trainer([best, sparsity], tmp_path, max_steps=12, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="is less sparse than the model"):
        run.fit(Net(), data(), data())
    assert zeros_of(best.best_model_path) < 0.7


@QUIET
def test_a_sparsity_that_stays_forgets_no_checkpoint(tmp_path):
    def rigl(module, optimizer):
        return ps.rigl(module, {"*": 0.5}, optimizer, stop=100, every=3)

    best = ModelCheckpoint(tmp_path, monitor="quality", mode="min")
    run = trainer([best, Sparsity(rigl)], tmp_path, max_epochs=3, enable_checkpointing=True)
    run.fit(Net(), data(), data())
    assert "step=8" in best.best_model_path


class Graded(Trainer):
    """Its metric is worse where the network is sparser, and with the number of steps."""

    def evaluate(self, *args, **keywords):
        zeros = sum(float((~mask).float().mean()) for _, mask in ps.named_masks(self.model))
        metrics = {"eval_loss": zeros + 1e-3 * self.state.global_step}
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


def graded(folder, stop, *, save=4, more=(), kind=SparsityCallback, **options):
    callback = kind(pruning(stop))
    given = TrainingArguments(
        str(folder), per_device_train_batch_size=4, num_train_epochs=1, use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="steps", eval_strategy="steps", save_steps=save,
        eval_steps=save, logging_strategy="no", load_best_model_at_end=True, **options,
    )  # fmt: skip
    run = Graded(
        Chain(), given, train_dataset=rows(), eval_dataset=rows(), callbacks=[callback, *more]
    )
    run.train()
    return run, callback


@pytest.mark.parametrize(("stop", "best"), [(3, 4), (4, 4), (5, 8), (12, 12)])
@pytest.mark.parametrize("limit", [None, 1])
@QUIET
def test_the_best_checkpoint_of_transformers_is_as_sparse_as_the_last(stop, best, limit, tmp_path):
    run, callback = graded(tmp_path, stop, save_total_limit=limit)
    assert run.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert ps.summary(run.model).masked.sparsity == pytest.approx(0.8, abs=0.01)
    assert callback.controller.history[-1].total == pytest.approx(0.8, abs=0.01)


@QUIET
def test_without_a_later_checkpoint_the_last_weights_stay(tmp_path):
    class NotAtTheEnd(TrainerCallback):
        def on_step_end(self, args, state, control, **given):
            control.should_evaluate &= state.global_step < 12

    run, _ = graded(tmp_path, stop=12, save=5, more=[NotAtTheEnd()])
    assert run.state.best_model_checkpoint is None
    assert ps.summary(run.model).masked.sparsity == pytest.approx(0.8, abs=0.01)


@QUIET
def test_worse_metrics_of_sparser_networks_do_not_stop_training_early(tmp_path):
    run, _ = graded(tmp_path, stop=11, save=2, more=[EarlyStoppingCallback(2)])
    assert run.state.global_step == 12


def test_a_less_sparse_checkpoint_that_is_loaded_at_the_end_is_told(tmp_path):
    class Remembering(SparsityCallback):
        def on_step_end(self, args, state, control, **given):
            best = state.best_metric, state.best_global_step, state.best_model_checkpoint
            super().on_step_end(args, state, control, **given)
            state.best_metric, state.best_global_step, state.best_model_checkpoint = best

    with pytest.warns(UserWarning, match=r"at the end has a sparsity of 31.\d%, .* reached 79.\d%"):
        graded(tmp_path, stop=10, kind=Remembering)


@pytest.mark.parametrize("stop", [12, 13])
def test_a_schedule_that_has_not_ended_is_told(stop, tmp_path):
    text = r"ended before the schedule: the sparsity is 7\d.\d% after 12 .* reaches 80.0%"
    runs = [
        lambda: graded(tmp_path / "hf", stop),
        lambda: trainer([Sparsity(pruning(stop))], tmp_path, max_steps=12, max_epochs=2).fit(
            Net(), data()
        ),
    ]
    for run in runs:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
        told = [str(each.message) for each in caught if "before the schedule" in str(each.message)]
        assert len(told) == (stop > 12)
        if told:
            with pytest.warns(UserWarning, match=text):
                warnings.warn(told[0], stacklevel=1)


def test_a_controller_of_your_own_needs_to_say_nothing(tmp_path):
    class Idle:
        def __init__(self, model):
            self.history = []
            self.model = ps.sparsify(model, {"*": 0.5})

        def step(self):
            pass

        def close(self):
            pass

        def state_dict(self):
            return {"start": dict(ps.named_masks(self.model))}

    net = Net()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "training has ended")
        trainer([Sparsity(lambda module, _: Idle(module))], tmp_path).fit(net, data())
    assert state_of(net)["body.parametrizations.weight.0.mask"].sum() == 16


def test_only_sparser_than_ever_has_risen():
    schedule = [0.0, 0.5, 0.5, 0.25, 0.5, 0.75]
    model = nn.Linear(10, 10)
    pruner = ps.GradualPruning(model, 0.8, schedule=lambda step: schedule[step], every=1)
    sparsest, risen = Sparsest(pruner), []
    for _ in range(5):
        pruner.step()
        risen.append(sparsest.has_risen())
    assert risen == [True, False, False, False, True]
    assert not Sparsest(pruner).has_risen()  # a run that goes on


def test_gates_are_told_about_in_the_middle_of_a_round():
    cs = ps.ContinuousSparsification(nn.Linear(4, 4), ps.Gate(), final_temperature=100.0, steps=5)
    told = [cs.unfinished()]
    for _ in range(5):
        cs.step()
        told.append(cs.unfinished())
    assert "temperature is 10 after 2 steps of the round; it reaches 100 at step 4" in told[2]
    assert [bool(text) for text in told] == [False, True, True, True, False, False]
    assert not Sparsest(cs).has_risen()
