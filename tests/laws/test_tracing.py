"""torch.fx, torch.jit and hooks: what looks at modules from outside."""

import pytest
import torch
from torch import nn

import parasparse as ps


class OwnProduct(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        return x @ self.weight


def test_fx_keeps_masked_weights_as_they_are():
    model = ps.sparsify(OwnProduct(), 0.5)
    graph = torch.fx.symbolic_trace(model)
    x = torch.randn(2, 4)
    assert torch.equal(graph(x), model(x))
    with torch.no_grad():
        model.parametrizations.weight.original.mul_(3)
    assert torch.equal(graph(x), model(x))
    ps.deploy_masks(model, {"weight": torch.tensor(1.0)})
    assert torch.equal(graph(x), x @ ps.stored(model, "weight"))
    assert [name for name, _ in graph.named_parameters()] == ["parametrizations.weight.original"]


@pytest.mark.filterwarnings("ignore::UserWarning")  # up to torch 2.9
def test_every_kind_of_hook_runs():
    model = ps.sparsify(nn.Linear(4, 4), 0.5)
    stack, x = model.parametrizations.weight, torch.randn(2, 4)
    seen = []
    for module in (stack, stack[0]):
        seen.clear()
        handles = [
            module.register_forward_pre_hook(lambda *_: seen.append("pre")),
            module.register_forward_hook(lambda *_: seen.append("forward")),
            module.register_full_backward_pre_hook(lambda *_: seen.append("backward_pre")),
        ]
        model(x).sum().backward()
        assert seen == ["pre", "forward", "backward_pre"]
        for handle in handles:
            handle.remove()
    names = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: names.append(type(module).__name__)
    )
    try:
        model(x)
    finally:
        handle.remove()
    assert names == ["Mask", "MaskedParametrizationList", "MaskedLinear"]


def test_jit_trace_agrees_and_squashed_models_script():
    model = ps.sparsify(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), 0.5)
    x = torch.randn(2, 4)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates both
        assert torch.equal(torch.jit.trace(model, x)(x), model(x))
        expected = model(x)
        assert torch.equal(torch.jit.script(ps.squash(model))(x), expected)


def test_feature_extractors_trace_through_masked_modules():
    from torchvision.models import swin_t
    from torchvision.models.feature_extraction import create_feature_extractor

    model = ps.sparsify(swin_t(weights=None).eval(), 0.5)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        features = create_feature_extractor(model, ["flatten"])(x)["flatten"]
        torch.testing.assert_close(model.head(features), model(x))
