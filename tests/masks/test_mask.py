import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import parasparse as ps
from parasparse import Mask, SoftMask


def mask_of(module):
    return module.parametrizations.weight[0]


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([[True, False, True], [False, False, True]]),
        torch.tensor([[1, 0, 1], [0, 0, 1]], dtype=torch.uint8),
        torch.tensor([[1, 0, 1], [0, 0, 1]]),
        torch.tensor([[1.0, -0.0, 1.0], [0.0, 0.0, 1.0]], dtype=torch.half),
        numpy.array([[1, 0, 1], [0, 0, 1]], dtype=numpy.float64),
        [[1, 0, 1], [0, 0, 1]],
        torch.tensor([[1.0, 0, 1], [0, 0, 1]]).to_sparse(),
    ],
    ids=["bool", "uint8", "int64", "half", "numpy", "list", "sparse"],
)
def test_zeros_and_ones_of_any_type_become_bool(value):
    mask = Mask(torch.ones(2, 3), value)
    assert mask.mask.dtype == torch.bool
    assert mask.mask.tolist() == [[True, False, True], [False, False, True]]


@given(st.sampled_from([(), (1,), (3,), (1, 1), (2, 1), (1, 3), (2, 3)]), st.integers(0, 99))
def test_a_mask_of_any_shape_that_broadcasts_is_taken(shape, seed):
    value = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    assert torch.equal(Mask(torch.ones(2, 3), value).mask, value.expand(2, 3))


@pytest.mark.parametrize("shape", [(2,), (3, 2), (4, 2, 3), (1, 2, 3), (0,)], ids=str)
def test_a_wrong_shape_is_a_runtime_error_in_torchs_words(shape):
    module = ps.sparsify(nn.Linear(3, 2), 0.5)
    before = mask_of(module).mask.clone()
    with pytest.raises(RuntimeError, match="must match the existing size"):
        mask_of(module).mask = torch.ones(shape)
    assert torch.equal(mask_of(module).mask, before)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (torch.tensor(float("nan")), ValueError),
        (torch.tensor(1j), TypeError),
        ("half", TypeError),
        ([[1], [1, 0]], TypeError),
    ],
    ids=["nan", "complex", "string", "ragged"],
)
def test_what_is_no_mask_is_refused_and_changes_nothing(value, error):
    module = ps.sparsify(nn.Linear(3, 2), 0.5)
    before = mask_of(module).mask.clone()
    with pytest.raises(error):
        mask_of(module).mask_(value)
    assert torch.equal(mask_of(module).mask, before)


def test_assigning_copies_and_keeps_the_buffer_of_the_same_kind():
    module = ps.sparsify(nn.Linear(3, 2), 0.5)
    buffer = mask_of(module).mask
    value = torch.ones(2, 3, dtype=torch.bool)
    mask_of(module).mask = value
    assert mask_of(module).mask is buffer
    value.zero_()
    assert buffer.all()


def test_a_real_mask_replaces_a_bool_one_and_back():
    module = ps.sparsify(nn.Linear(3, 2, dtype=torch.bfloat16), 0.5)
    assert mask_of(module).mask_(torch.tensor(0.5)) is mask_of(module)
    assert mask_of(module).mask.dtype == torch.bfloat16
    assert torch.equal(module.weight, ps.stored(module, "weight") * 0.5)
    mask_of(module).mask = torch.tensor(1.0)
    assert mask_of(module).mask.dtype == torch.bool


def test_an_unset_mask_refuses_to_be_read_and_to_be_squashed():
    module = ps.sparsify(nn.Linear(3, 2), {"weight": ps.Fixed(None)})
    assert list(ps.named_masks(module)) == [("weight", None)]
    for use in (lambda: module.weight, lambda: module(torch.ones(1, 3)), lambda: ps.squash(module)):
        with pytest.raises(RuntimeError, match="has no sparsity mask"):
            use()
    mask_of(module).mask = torch.tensor(1.0)
    assert torch.equal(module.weight, ps.stored(module, "weight"))
    mask_of(module).mask = None
    mask_of(module).mask = None  # no effect
    with pytest.raises(RuntimeError, match="has no sparsity mask"):
        module.weight  # noqa: B018


def test_an_unset_mask_follows_the_dtype_and_device_of_its_tensor():
    module = ps.sparsify(nn.Linear(3, 2), {"weight": ps.Fixed(None)}).double()
    mask_of(module).mask = torch.tensor(0.5)
    assert mask_of(module).mask.dtype == torch.double
    meta = ps.sparsify(nn.Linear(3, 2), {"weight": ps.Fixed(None)}).to("meta")
    mask_of(meta).mask = torch.tensor(1.0)
    assert mask_of(meta).mask.is_meta


def test_an_unset_mask_of_a_channels_last_weight_gets_its_memory_format():
    module = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    ps.sparsify(module, {"weight": ps.Fixed(None)})
    mask_of(module).mask = torch.ones(4, 4, 3, 3)
    assert mask_of(module).mask.is_contiguous(memory_format=torch.channels_last)


def test_an_unset_mask_follows_a_later_change_of_memory_format():
    module = ps.sparsify(nn.Conv2d(4, 4, 3), {"weight": ps.Fixed(None)})
    module.to(memory_format=torch.channels_last)
    mask_of(module).mask = torch.rand(4, 4, 3, 3) < 0.5
    assert module.weight.is_contiguous(memory_format=torch.channels_last)
    mask_of(module).mask = None
    module.to(memory_format=torch.contiguous_format)
    mask_of(module).mask = torch.rand(4, 4, 3, 3) < 0.5
    assert module.weight.is_contiguous()


def test_a_mask_can_be_set_to_a_view_of_itself():
    module = ps.sparsify(nn.Linear(4, 4), 0.5)
    before = mask_of(module).mask.clone()
    mask_of(module).mask = mask_of(module).mask.t()
    assert torch.equal(mask_of(module).mask, before.t())


def test_assigning_to_a_real_mask_in_float8():
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn), requires_grad=False)
    ps.sparsify(module, {"weight": [0.5, 0.0]})
    module.weight = torch.tensor([2.0, 3.0]).to(torch.float8_e4m3fn)
    assert module.weight.float().tolist() == [2.0, 0.0]


def test_masks_can_be_swapped_while_training_and_kept_entries_alone_are_updated():
    module = ps.sparsify(nn.Linear(3, 2, bias=False), 0.5)
    stored = ps.stored(module, "weight")
    for _ in range(3):
        mask = torch.rand(2, 3) < 0.5
        mask_of(module).mask = mask
        before = stored.detach().clone()
        module.zero_grad()
        module(torch.randn(4, 3)).sum().backward()
        torch.optim.SGD([stored], lr=0.1).step()
        assert torch.equal(stored[~mask], before[~mask])
        assert not mask.any() or not torch.equal(stored[mask], before[mask])


def test_a_mask_changed_between_forward_and_backward_is_an_error():
    module = ps.sparsify(nn.Linear(3, 2), 0.5)
    out = module(torch.ones(1, 3)).sum()
    mask_of(module).mask = torch.tensor(0.0)
    with pytest.raises(RuntimeError):  # torch's own
        out.backward()


def test_masks_made_in_inference_mode_train():
    module = nn.Linear(3, 2)
    with torch.inference_mode():
        ps.sparsify(module, 0.5)
    module(torch.ones(1, 3)).sum().backward()


def test_a_stock_registration_of_our_mask_works():
    module = nn.Linear(3, 2)
    dense = module.weight.detach().clone()
    nn.utils.parametrize.register_parametrization(module, "weight", Mask(dense, dense > 0))
    assert torch.equal(module.weight, dense.clamp(min=0))


def test_a_soft_mask_is_one_at_first_and_hardens_with_the_temperature():
    tensor = torch.randn(4)
    soft = SoftMask(tensor, init=-0.5)
    assert torch.equal(soft(tensor), tensor)
    with torch.no_grad():
        soft.logits.copy_(torch.tensor([-1.0, 0.5, 1.0, -0.1]))
    soft.temperature.fill_(1e4)
    torch.testing.assert_close(soft.mask, ps.gates.sigmoid(soft.logits, init=-0.5, hard=True))
    soft.hard = True
    out = soft(torch.full((4,), float("inf")))
    assert out.tolist() == [0.0, float("inf"), float("inf"), 0.0]


def test_the_gradient_of_a_gate_is_that_of_its_formula():
    logits = torch.randn(3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda s: ps.gates.sigmoid(s, torch.tensor(3.0, dtype=torch.double), init=0.2), logits
    )
    gate = ps.gates.sigmoid(logits, 3.0, init=0.2)
    wanted = 1 / (1 + (-3 * logits).exp()) * (1 + torch.tensor(-0.2, dtype=torch.double).exp())
    torch.testing.assert_close(gate, wanted)
