"""LoRA of PEFT on a masked base model."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import parasparse as ps
from parasparse.integrations.peft import merge_and_unload

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own, on models without a config


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.two(torch.relu(self.one(x)))


def adapted(base, **options):
    model = get_peft_model(base, LoraConfig(r=2, **options))
    with torch.no_grad():  # a new B is 0: the adapter does nothing yet
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_masks_hold_when_adapters_are_merged(options):
    torch.manual_seed(0)
    base = ps.sparsify(Net(), 0.75)
    masks = {name: mask.clone() for name, mask in ps.named_masks(base)}
    effective = {name: getattr(base, name[:3]).weight.detach().clone() for name in masks}
    dense = Net()
    dense.load_state_dict(ps.dense_state_dict(base))
    model = adapted(base, target_modules=["one"], **options)

    # PEFT's own merge on the same weights, unmasked.
    other = get_peft_model(dense, LoraConfig(r=2, target_modules=["one"], **options))
    ours = {
        n.replace("parametrizations.weight.original", "weight"): p
        for n, p in model.named_parameters()
    }
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora" in name:
                parameter.copy_(ours[name])
    expected = other.merge_and_unload()

    merged = merge_and_unload(model)
    assert isinstance(merged, Net)
    assert list(dict(ps.named_masks(merged))) == ["one.weight", "two.weight"]
    for name, mask in ps.named_masks(merged):
        assert torch.equal(mask, masks[name])
    assert torch.equal(merged.one.weight, torch.where(masks["one.weight"], expected.one.weight, 0))
    assert torch.equal(merged.two.weight, effective["two.weight"])
    assert not torch.equal(merged.one.weight, effective["one.weight"])


def test_masks_hold_while_an_adapter_trains():
    torch.manual_seed(0)
    model = adapted(ps.sparsify(Net(), 0.75), target_modules=["one"])
    before = model.base_model.model.one.base_layer.weight.detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1)
    x = torch.randn(16, 8)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert torch.equal(model.base_model.model.one.base_layer.weight, before)
    assert int((before == 0).sum()) >= 96


def test_a_base_that_is_wrapped_already_is_masked_by_its_names():
    model = adapted(Net(), target_modules=["one"])
    ps.sparsify(model, {"*.base_layer.weight": 0.5})
    assert [name for name, _ in ps.named_masks(model)] == ["base_model.model.one.base_layer.weight"]
    merged = merge_and_unload(model)
    assert float((merged.one.weight == 0).float().mean()) == 0.5
    assert ps.is_sparse(merged)


def test_a_language_model_merges_and_is_saved(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    base = ps.sparsify(GPT2LMHeadModel(config), 0.8)
    model = adapted(base, target_modules=["c_attn"], fan_in_fan_out=True)
    merged = merge_and_unload(model).eval()
    ids = torch.arange(8)[None]
    expected = merged(ids).logits
    ps.squash(merged).save_pretrained(tmp_path)
    again = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, expected)
    zeros = (again.transformer.h[0].attn.c_attn.weight == 0).float().mean()
    assert float(zeros) == pytest.approx(0.8, abs=0.01)


def test_what_was_merged_before_is_merged_after_all():
    """PEFT's own merge writes nothing where masks are, and calls the adapter merged."""
    torch.manual_seed(0)
    model = adapted(ps.sparsify(Net(), 0.75), target_modules=["one", "two"])
    ps.squash(model, "*.two.*")  # one is masked, two is not: there PEFT does merge
    state = {name: value.clone() for name, value in model.state_dict().items()}
    straight = merge_and_unload(model)

    other = adapted(ps.sparsify(Net(), 0.75), target_modules=["one", "two"])
    ps.squash(other, "*.two.*")
    other.load_state_dict(state)
    other.merge_adapter()
    merged = merge_and_unload(other)
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, straight.state_dict()[name])  # unmerging rounds


@pytest.mark.parametrize(
    ("treatment", "message"),
    [
        (None, "it has none"),
        (ps.Gate(), "`binarize` turns learned"),
        (ps.Fixed(0.5), "`binarize` turns learned and real-valued"),
    ],
)
def test_other_masks_are_refused(treatment, message):
    base = Net() if treatment is None else ps.sparsify(Net(), treatment)
    with pytest.raises(ValueError, match=message):
        merge_and_unload(adapted(base, target_modules=["one"]))


def test_a_failed_merge_leaves_weights_masks_and_outputs():
    model = adapted(ps.sparsify(Net(), 0.75), target_modules=["one"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(TypeError):
        merge_and_unload(model, no_such_option=1)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def test_a_merge_that_fails_half_way_leaves_what_it_did_not_reach():
    model = adapted(ps.sparsify(Net(), 0.75), target_modules=["one", "two"])
    two = model.base_model.model.two
    stored = ps.stored(two, "base_layer.weight").detach().clone()
    with torch.no_grad():
        two.lora_B["default"].weight.fill_(float("nan"))
    with pytest.raises(ValueError):  # PEFT's own
        merge_and_unload(model, safe_merge=True)
    assert torch.equal(ps.stored(two, "base_layer.weight"), stored)
    assert len(dict(ps.named_masks(model))) == 2
