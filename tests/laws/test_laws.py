"""Every law on every case: what holds whatever the module is."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call

import parasparse as ps
from parasparse.targets.reach import masked_targets
from parasparse.targets.tensors import tensors_of
from tests.helpers.cases import CASES, Tied

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def tensors(model):
    """The values that module attributes give, by plain name, parts of pairs apart."""
    found = {}
    for target in tensors_of(model, pairs=False):
        site = target.firsts[0]
        found[target.name] = getattr(site.module, site.attr).detach().clone()
    return found


def run(model, inputs):
    torch.manual_seed(1)
    out = model(*inputs)
    while isinstance(out, tuple):
        out = out[0]
    return out


def loss_of(out):
    out = out.abs() if out.is_complex() else out
    return (out.float() ** 2).sum()


def build(case):
    return case.build(), case.inputs()


def masks_by_part(model):
    return {
        (site.module, site.attr): target.masks()[0].mask
        for target in masked_targets(model)
        for site in target.sites
    }


@every_case
def test_squash_gives_back_class_keys_order_and_parameter_objects(case):
    model, _ = build(case)
    classes = [type(module) for module in model.modules()]
    keys, order = list(model.state_dict()), [n for n, _ in model.named_parameters()]
    objects = dict(model.named_parameters())
    pointers = {name: p.data_ptr() for name, p in objects.items()}
    ps.squash(ps.sparsify(model, case.rules))
    if case.underneath:
        assert type(model) is nn.Linear
        assert set(dict(model.named_parameters())) == {"weight", "bias"}
        return
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_parameters()] == order
    for name, parameter in model.named_parameters():
        assert parameter is objects[name]
        assert parameter.data_ptr() == pointers[name]
    assert not ps.is_sparse(model)


@every_case
def test_the_state_of_a_squashed_module_is_that_of_one_never_sparsified(case):
    model, _ = build(case)
    before = set(model.__dict__)
    hooks = len(model._load_state_dict_pre_hooks)
    ps.squash(ps.sparsify(model, case.rules))
    assert set(model.__dict__) - {"_flat_weights"} == before - {"_flat_weights"}
    assert case.underneath or len(model._load_state_dict_pre_hooks) == hooks


@every_case
def test_kept_entries_pass_bit_for_bit_and_the_others_are_plus_zero(case):
    model, _ = build(case)
    dense = tensors(model)
    ps.sparsify(model, case.rules)
    assert list(ps.named_masks(model))
    for target in masked_targets(model):
        for part in target.components:
            value = getattr(part[0].module, part[0].attr)
            mask = target.masks()[0].mask
            own = next(
                n for n in target.names if n in dense and torch.equal(dense[n][mask], value[mask])
            )
            assert torch.equal(value[mask], dense[own][mask])
            dropped = torch.view_as_real(value[~mask]) if value.is_complex() else value[~mask]
            assert not dropped.any()
            assert not torch.signbit(dropped).any()


@every_case
def test_gradients_are_plus_zero_where_masked_and_the_dense_ones_elsewhere(case):
    model, inputs = build(case)
    ps.sparsify(model, case.rules)
    squashed = ps.squash(copy.deepcopy(model))
    loss_of(run(model, inputs)).backward()
    loss_of(run(squashed, inputs)).backward()
    if case.underneath:
        return  # the stored tensors are others than the squashed ones
    dense = dict(squashed.named_parameters())
    compared = 0
    for target in masked_targets(model):
        for part in target.components:
            stored = ps.stored(model, _name(target, part))
            if stored.grad is None:
                assert not stored.requires_grad or target.is_buffer
                continue
            mask, grad = target.masks()[0].mask, stored.grad
            assert not grad[~mask].any()
            dropped = torch.view_as_real(grad[~mask]) if grad.is_complex() else grad[~mask]
            assert not torch.signbit(dropped).any()
            wanted = dense[_name(target, part)].grad
            torch.testing.assert_close(grad[mask], wanted[mask])
            compared += 1
    assert compared or not any(p.requires_grad for p in masked_parameters(model))


def _name(target, part):
    attr = part[0].attr
    return next(n for n in target.names if n.rpartition(".")[2] == attr)


def masked_parameters(model):
    return [
        p
        for target in masked_targets(model)
        for p in [ps.stored(model, target.name)]
        if isinstance(p, nn.Parameter)
    ]


@every_case
def test_masked_entries_stay_zero_and_stored_through_momentum_and_decay(case):
    model, inputs = build(case)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad] or [nn.Parameter(torch.zeros(1))],
        lr=0.01,
        momentum=0.9,
    )
    ps.sparsify(model, case.rules)
    kept = {key: mask.clone() for key, mask in masks_by_part(model).items()}
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(run(model, inputs)).backward()
        optimizer.step()
    for (module, attr), mask in kept.items():
        assert not getattr(module, attr)[~mask].any()


@every_case
def test_squash_changes_no_output_and_unsparsify_restores_the_dense_one(case):
    model, inputs = build(case)
    model.eval()
    with torch.no_grad():
        dense = run(model, inputs)
        before = tensors(model)
        ps.sparsify(model, case.rules)
        sparse = run(model, inputs)
        ps.unsparsify(copy_ := copy.deepcopy(model))
        assert torch.equal(run(copy_, inputs), dense)
        after = tensors(copy_)
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert torch.equal(run(ps.squash(model), inputs), sparse)


@every_case
def test_a_squashed_copy_leaves_the_original_whole(case):
    model, inputs = build(case)
    ps.sparsify(model.eval(), case.rules)
    loss_of(run(model, inputs)).backward()
    expected = run(model, inputs).detach()
    twin = copy.deepcopy(model)
    ps.squash(twin)
    ps.sparsify(twin, case.rules if not case.underneath else 0.5)
    assert torch.equal(run(model, inputs), expected)
    for a, b in zip(model.modules(), copy.deepcopy(model).modules(), strict=True):
        assert type(a) is type(b)
    for (_, mask), (_, other) in zip(
        ps.named_masks(model), ps.named_masks(copy.deepcopy(model)), strict=True
    ):
        assert mask.data_ptr() != other.data_ptr()


@every_case
def test_pickle_and_torch_save_keep_everything(case):
    if not case.pickles:
        pytest.skip("the dense module does not pickle")
    model, inputs = build(case)
    ps.sparsify(model.eval(), case.rules)
    expected = run(model, inputs)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(run(twin, inputs), expected)
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert len(list(ps.named_masks(twin))) == len(list(ps.named_masks(model)))
        ps.squash(twin)
        assert torch.equal(run(model, inputs), expected)


@every_case
def test_checkpoints_go_from_dense_to_sparse_and_back_strictly(case):
    model, inputs = build(case)
    model.eval()
    dense = {k: v.clone() for k, v in model.state_dict().items()}
    ps.sparsify(model, case.rules)
    expected = run(model, inputs)
    masks = {name: mask.clone() for name, mask in ps.named_masks(model)}

    other = ps.sparsify(case.build().eval(), case.rules)
    other.load_state_dict(model.state_dict())  # sparse -> sparse
    assert torch.equal(run(other, inputs), expected)

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(dense)  # dense -> sparse: masks stay
    assert torch.equal(run(model, inputs), expected)
    assert all(torch.equal(mask, masks[name]) for name, mask in ps.named_masks(model))

    fresh = case.build().eval()
    ps.load_state_dict(fresh, model.state_dict())  # sparse -> dense: masks come along
    assert torch.equal(run(fresh, inputs), expected)

    folded = ps.dense_state_dict(model)
    squashed = ps.squash(copy.deepcopy(model)).state_dict()
    assert list(folded) == list(squashed)
    assert all(torch.equal(folded[key], squashed[key]) for key in folded)
    assert folded._metadata == squashed._metadata
    plain = ps.squash(ps.sparsify(case.build().eval(), case.rules))
    plain.load_state_dict(folded)
    assert torch.equal(run(plain, inputs), expected)


@every_case
def test_functional_call_with_its_own_parameters_agrees(case):
    model, inputs = build(case)
    ps.sparsify(model.eval(), case.rules)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    torch.manual_seed(1)
    out = functional_call(model, state, inputs)
    while isinstance(out, tuple):
        out = out[0]
    assert torch.equal(out, run(model, inputs))


@every_case
def test_export_agrees(case):
    model, inputs = build(case)
    ps.sparsify(model.eval(), case.rules)
    expected = run(model, inputs)
    for strict in (False, True):
        if strict and not case.compiles:
            continue
        if strict and isinstance(model, Tied) and TORCH < (2, 10):
            continue  # torch 2.9 loses the buffers of a shared module there: a KeyError of its own
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own
            program = torch.export.export(model, inputs, strict=strict).module()
        torch.testing.assert_close(run(program, inputs), expected)


@every_case
def test_compile_agrees_in_values_and_gradients(case):
    model, inputs = build(case)
    ps.sparsify(model.eval(), case.rules)
    expected = run(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # complex operators, in torch's words
        compiled = torch.compile(model, backend="aot_eager", fullgraph=case.compiles)
        out = run(compiled, inputs)
        torch.testing.assert_close(out, expected)
        if not expected.requires_grad:
            return
        parameters = [p for p in model.parameters() if p.requires_grad]
        wanted = torch.autograd.grad(loss_of(expected), parameters, allow_unused=True)
        grads = torch.autograd.grad(loss_of(out), parameters, allow_unused=True)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want)


@every_case
def test_assigning_writes_kept_entries_only_and_aliases_nothing(case):
    if case.underneath:
        pytest.skip("the inverse of a normalisation does not give back any value")
    model, _ = build(case)
    ps.sparsify(model, case.rules)
    for target in masked_targets(model):
        for part in target.components:
            module, attr = part[0].module, part[0].attr
            before = ps.stored(model, _name(target, part)).detach().clone()
            mask = target.masks()[0].mask
            value = torch.randn_like(before)
            setattr(module, attr, value)
            assert torch.equal(getattr(module, attr)[mask], value[mask])
            after = ps.stored(model, _name(target, part))
            assert torch.equal(after[~mask], before[~mask])
            value.zero_()
            assert torch.equal(after[~mask], before[~mask])
            assert not mask.any() or getattr(module, attr)[mask].any()


@every_case
def test_the_mask_has_the_memory_format_device_and_kind_it_should(case):
    model, _ = build(case)
    ps.sparsify(model, case.rules)
    for target in masked_targets(model):
        mask = target.masks()[0].mask
        stored = ps.stored(model, _name(target, target.components[0]))
        assert mask.dtype == torch.bool
        assert mask.shape == stored.shape
        assert mask.device == stored.device
        assert mask.stride() == stored.stride()
        assert getattr(target.firsts[0].module, target.firsts[0].attr).stride() == stored.stride()
