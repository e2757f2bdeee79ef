"""`parasparse prune-blocks` does to a folder what `prune_blocks` does to its model."""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5Model,
)

import parasparse as ps
from parasparse.cli.language_model import perplexity
from parasparse.cli.prune_blocks import METHODS
from tests.helpers.checkpoints import run

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "saw"]


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama with its tokenizer, and a text."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 1, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "in")
    vocabulary = {word: number for number, word in enumerate(["?", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(
        tmp_path / "in"
    )
    words = [WORDS[i] for i in torch.randint(len(WORDS), (600,))]
    (tmp_path / "text.txt").write_text(" ".join(words))
    return tmp_path


def arguments(folder, *more):
    return [
        "prune-blocks", str(folder / "in"), str(folder / "out"), "--text", str(folder / "text.txt"),
        "--samples", "6", "--length", "8", *more,
    ]  # fmt: skip


def linear_weights(model):
    return {n: p for n, p in model.named_parameters() if "layers" in n and p.ndim == 2}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_prunes_the_blocks_and_measures_perplexity(folder, method, capsys):
    assert run(*arguments(folder, "--method", method, "--sparsity", "0.5")) == 0
    assert "perplexity" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(folder / "out")
    dense = AutoModelForCausalLM.from_pretrained(folder / "in")
    for name, weight in linear_weights(model).items():
        assert weight.count_nonzero() == weight.numel() // 2, name
    assert torch.equal(model.lm_head.weight, dense.lm_head.weight)
    assert model.config.use_cache == dense.config.use_cache
    report = json.loads((folder / "out" / "parasparse.json").read_text())
    assert report["sparsity"] == 0.5
    assert report["perplexity"]["before"] > 1
    assert [block["name"] for block in report["blocks"]] == ["model.layers.0", "model.layers.1"]


def test_it_does_what_python_does(folder):
    assert run(*arguments(folder, "--pattern", "2:4", "--method", "wanda")) == 0
    model = AutoModelForCausalLM.from_pretrained(folder / "in")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "in")
    tokens = torch.tensor(tokenizer((folder / "text.txt").read_text())["input_ids"])[:540]
    starts = [number * (540 - 8) // 5 for number in range(6)]
    batches = [torch.stack([tokens[start : start + 8] for start in starts])]
    rule = ps.OneShot(pattern=ps.patterns.n_of_m(2, 4), update="none", score="wanda")
    ps.squash(ps.prune_blocks(model, batches, rule))
    found = AutoModelForCausalLM.from_pretrained(folder / "out").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_an_existing_folder_is_replaced_by_force(folder, capsys):
    line = arguments(folder, "--method", "magnitude", "--sparsity", "0.5")
    assert [run(*line), run(*line), run(*line, "--force")] == [0, 1, 0]
    assert "--force" in capsys.readouterr().err


WRONG = {
    "no sparsity": ([], "--sparsity must be given"),
    "two sparsities": (["--pattern", "2:4", "--sparsity", "0.5"], "must be omitted with 2:4"),
    "a sparsity out of range": (["--sparsity", "50"], "must be"),
    "no folder": (["--sparsity", "0.5", "--tokenizer", "nowhere"], "must be a folder"),
    "no samples": (["--sparsity", "0.5", "--samples", "0"], "--samples must be at least 1; got 0"),
    "no length": (["--sparsity", "0.5", "--length", "1"], "--length must be at least 2; got 1"),
    "no batches": (["--sparsity", "0.5", "--batch-size", "-2"], "--batch-size must be at least 1"),
    "a pattern that does not fit": (["--pattern", "3:5"], 'while pruning "model.layers.0.'),
    "no text": (["--sparsity", "0.5", "--text", "nowhere.txt"], "cannot be read as text"),
    "little text": (["--sparsity", "0.5", "--length", "64"], "ten times --length"),
    "long sequences": (["--sparsity", "0.5", "--length", "32"], "at most 16"),
    "no blocks": (["--sparsity", "0.5", "--blocks", "h.*"], "reaches none"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_call_writes_nothing(folder, kind, capsys):
    more, text = WRONG[kind]
    assert run(*arguments(folder), *more) == 1
    assert text in capsys.readouterr().err
    assert not (folder / "out").exists()


def has_no_config(model):
    (model / "config.json").unlink()


def has_no_tokenizer(model):
    (model / "tokenizer.json").unlink()


def is_damaged(model):
    (model / "model.safetensors").write_bytes(b"x" * 100)


def is_no_language_model(model):
    config = LlamaConfig.from_pretrained(model)
    LlamaModel(config).save_pretrained(model)


def is_an_encoder_with_decoder(model):
    config = T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=40)
    T5Model(config).save_pretrained(model)


BAD_FOLDERS = {
    has_no_config: "has no config.json",
    has_no_tokenizer: "could not load the tokenizer (--tokenizer) in",
    is_damaged: "could not load the model in",
    is_no_language_model: 'must hold a causal language model; it has no "lm_head.weight"',
    is_an_encoder_with_decoder: "could not load the model in",
}


@pytest.mark.parametrize("spoil", BAD_FOLDERS)
def test_a_folder_that_cannot_be_pruned_is_refused_in_a_line(folder, spoil, capsys):
    spoil(folder / "in")
    assert run(*arguments(folder, "--sparsity", "0.5")) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert BAD_FOLDERS[spoil] in error
    assert len(error) < 800
    assert not (folder / "out").exists()


def test_a_perplexity_beyond_all_numbers_is_infinite(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "in")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    assert perplexity(model, torch.arange(12).view(1, 12)) == math.inf


def test_the_tokenizer_of_another_model_is_refused(folder, capsys):
    config = LlamaConfig(
        vocab_size=5, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "in")
    assert run(*arguments(folder, "--sparsity", "0.5")) == 1
    assert "must be that of the model, which has 5 tokens" in capsys.readouterr().err
