"""The callback with the real Trainer of Hugging Face, on a tiny BERT and a tiny GPT-2."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import parasparse as ps
from parasparse.integrations.transformers import SparsityCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, on tiny configs


def bert():
    torch.manual_seed(0)
    return BertForMaskedLM(
        BertConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=16,
        )
    )  # fmt: skip


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def data():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(40, (48, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


EMBEDDINGS = {bert: "bert.embeddings.word_embeddings.weight", gpt2: "transformer.wte.weight"}


def gradual(build):
    # The embedding is tied to the head: one mask at both places.
    rules = [(EMBEDDINGS[build], 0.5), ("*.weight", 0.8)]

    def factory(model, optimizer):
        schedule = ps.schedules.Cubic(0.0, 1.0, stop=9)
        return ps.GradualPruning(model, dict(rules), optimizer, schedule=schedule, every=3)

    return factory


def rigl(build):
    def factory(model, optimizer):
        torch.manual_seed(7)  # the first masks are drawn
        return ps.rigl(model, 0.8, optimizer, stop=100, every=4)

    return factory


def arguments(folder, **more):
    return TrainingArguments(
        folder, per_device_train_batch_size=4, num_train_epochs=1, use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="steps", save_steps=6, logging_strategy="no", seed=0,
        **more,
    )  # fmt: skip


def trained(build, factory, folder, resume=None, **more):
    callback = SparsityCallback(factory)
    trainer = Trainer(
        build(), arguments(folder, **more), train_dataset=data(), callbacks=[callback]
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model, callback.controller


def assert_equal(one, two):
    one, two = one.state_dict(), two.state_dict()
    assert one.keys() == two.keys()
    for key in one:
        assert torch.equal(one[key], two[key]), key


@pytest.mark.parametrize("method", [gradual, rigl])
@pytest.mark.parametrize("build", [bert, gpt2])
def test_a_run_that_goes_on_from_a_checkpoint_ends_bit_for_bit_alike(build, method, tmp_path):
    straight, whole = trained(build, method(build), tmp_path)
    assert whole.steps == 12
    assert len(whole.history) == 3
    folder = str(tmp_path / "checkpoint-6")
    resumed, controller = trained(build, method(build), tmp_path, resume=folder)
    assert_equal(resumed, straight)
    assert controller.history == whole.history
    assert controller.steps == 12


def test_a_checkpoint_elsewhere_is_named_in_the_arguments(tmp_path):
    straight, _ = trained(bert, rigl(bert), tmp_path / "a")
    folder = str(tmp_path / "a" / "checkpoint-6")
    with pytest.raises(FileNotFoundError, match="resume_from_checkpoint=folder"):
        trained(bert, rigl(bert), tmp_path / "b", resume=folder)
    resumed, _ = trained(
        bert, rigl(bert), tmp_path / "b", resume=folder, resume_from_checkpoint=folder
    )
    assert_equal(resumed, straight)


@pytest.mark.parametrize("build", [bert, gpt2])
def test_what_is_squashed_is_saved_and_read_again(build, tmp_path):
    model, _ = trained(build, gradual(build), tmp_path)
    ids = torch.arange(8)[None]
    model.eval()
    expected = model(ids).logits
    ps.squash(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    assert torch.equal(again(ids).logits, expected)
    assert {name for name, _ in again.named_parameters()} == {
        name for name, _ in build().named_parameters()
    }
    ps.sparsify(again, {EMBEDDINGS[build]: "zeros", "*.weight": "zeros"})  # to be fine-tuned
    assert float((again.get_output_embeddings().weight == 0).float().mean()) >= 0.5


@pytest.mark.parametrize("tied", [False, True])
def test_a_masked_embedding_is_not_resized(tied):
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2,
                   tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1)
    )  # fmt: skip
    ps.sparsify(model, {"transformer.wte.weight": 0.5})
    with pytest.raises(RuntimeError, match="masked and cannot be resized"):
        model.resize_token_embeddings(50)
    embedding = model.get_input_embeddings()
    assert embedding.num_embeddings == 40
    assert model.config.vocab_size == 40
    assert (embedding.weight == 0).float().mean() == 0.5


def test_a_tied_embedding_is_saved_masked(tmp_path):
    model, _ = trained(gpt2, gradual(gpt2), tmp_path)
    model.save_pretrained(tmp_path / "masked")
    names = load_file(tmp_path / "masked" / "model.safetensors").keys()
    tied = ("transformer.wte", "lm_head")  # one of the two is saved
    assert sum(f"{place}.parametrizations.weight.0.mask" in names for place in tied) == 1


@pytest.mark.parametrize("build", [bert, gpt2])
def test_a_masked_model_is_saved_dense(build, tmp_path):
    model = ps.sparsify(build(), {EMBEDDINGS[build]: 0.5, "*.weight": 0.8}).eval()
    model.save_pretrained(tmp_path, state_dict=ps.dense_state_dict(model))
    ids = torch.arange(8)[None]
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_model_of_the_trainers_own_is_refused_where_it_goes_on(tmp_path):
    callback = SparsityCallback(rigl(bert))
    Trainer(bert(), arguments(tmp_path), train_dataset=data(), callbacks=[callback]).train()
    other = Trainer(
        model_init=bert, args=arguments(tmp_path), train_dataset=data(),
        callbacks=[SparsityCallback(rigl(bert))],
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="must be loaded together with its masks"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_a_model_of_the_trainers_own_trains(tmp_path):
    callback = SparsityCallback(rigl(bert))
    trainer = Trainer(
        model_init=bert, args=arguments(tmp_path), train_dataset=data(), callbacks=[callback]
    )
    trainer.train()
    assert callback.controller.steps == 12
    assert ps.is_sparse(trainer.model)


def test_a_further_training_goes_on_with_its_masks(tmp_path):
    callback = SparsityCallback(gradual(bert))
    trainer = Trainer(bert(), arguments(tmp_path), train_dataset=data(), callbacks=[callback])
    trainer.train()
    masks = {name: mask.clone() for name, mask in ps.named_masks(trainer.model)}
    trainer.train()
    assert all(torch.equal(mask, masks[name]) for name, mask in ps.named_masks(trainer.model))
    assert callback.controller.steps == 24
    assert len(callback.controller.history) == 3


def test_the_controller_of_another_run_is_refused(tmp_path):
    """Both have a checkpoint of step 6; the one that is meant lies elsewhere."""
    trained(bert, gradual(bert), tmp_path / "a")

    def other(model, optimizer):
        schedule = ps.schedules.Linear(0.0, 1.0, stop=12)
        rules = {EMBEDDINGS[bert]: 0.1, "*.weight": 0.3}
        return ps.GradualPruning(model, rules, optimizer, schedule=schedule, every=3)

    trained(bert, other, tmp_path / "b")
    folder = str(tmp_path / "b" / "checkpoint-6")
    with pytest.raises(RuntimeError, match="must be loaded together with its masks"):
        trained(bert, other, tmp_path / "a", resume=folder)


def test_masked_weights_are_loaded_where_the_trainer_holds_the_model(tmp_path):
    model = bert()
    Trainer(model, arguments(tmp_path), callbacks=[SparsityCallback(gradual(bert))])
    masked = ps.sparsify(bert(), 0.5)
    model.load_state_dict(masked.state_dict())
    assert_equal(model, masked)


def test_a_base_whose_masks_are_not_saved_is_refused(tmp_path):
    """Of a PEFT model the Trainer saves the adapters alone."""

    def adapted():
        return get_peft_model(bert(), LoraConfig(r=2, target_modules=["query"]))

    def factory(model, optimizer):
        schedule = ps.schedules.Cubic(0.0, 1.0, stop=9)
        rules = {"*.base_layer.weight": 0.8}
        return ps.GradualPruning(model, rules, None, schedule=schedule, every=3)

    trained(adapted, factory, tmp_path)
    with pytest.raises(RuntimeError, match="only the adapters"):
        trained(adapted, factory, tmp_path, resume=str(tmp_path / "checkpoint-6"))


def test_a_masked_checkpoint_is_read_outside_of_the_trainer(tmp_path):
    model, _ = trained(gpt2, gradual(gpt2), tmp_path)
    again = gpt2()
    state = load_file(tmp_path / "checkpoint-12" / "model.safetensors")
    ps.load_state_dict(again, state, strict=False)  # ties are in it once
    assert_equal(again, model)


class Shrinks(TrainerCallback):
    """Remove half of the units after the first epoch."""

    def on_epoch_end(self, args, state, control, model=None, optimizer=None, **more):
        if state.epoch == 1:
            inputs = {"input_ids": torch.arange(8).unsqueeze(0)}
            ps.sparsify(model, ps.coupled(model, inputs).rules(0.5))
            ps.shrink(model, inputs, optimizer=optimizer)


@pytest.mark.parametrize("build", [bert, gpt2])
def test_training_goes_on_after_shrink(build, tmp_path):
    run = arguments(tmp_path, max_steps=36)  # three epochs
    trainer = Trainer(build(), run, train_dataset=data(), callbacks=[Shrinks()])
    full = sum(parameter.numel() for parameter in trainer.model.parameters())
    trainer.train()
    live = set(trainer.model.parameters())
    assert sum(parameter.numel() for parameter in live) < full
    held = {p for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == live
    for parameter, state in trainer.optimizer.state.items():
        assert state["exp_avg"].shape == parameter.shape
        assert state["step"] == 36
