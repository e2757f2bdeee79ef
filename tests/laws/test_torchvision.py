"""Real networks: sparsify 80 %, squash, and get the same output bit for bit."""

import copy

import pytest
import torch
from torchvision import models

import parasparse as ps
from tests.long.torchvision_models import check

MODELS = {
    "resnet18": (lambda: models.resnet18(weights=None), 64),
    "mobilenet_v3_small": (lambda: models.mobilenet_v3_small(weights=None), 64),
    "vit_b_16": (lambda: models.vit_b_16(weights=None, image_size=32), 32),
    "swin_t": (lambda: models.swin_t(weights=None), 64),
    "densenet121": (lambda: models.densenet121(weights=None), 64),
    "segmentation_lraspp": (
        lambda: models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None),
        64,
    ),
    "detection_ssdlite": (
        lambda: models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None),
        64,
    ),
}


def flat(out):
    if isinstance(out, torch.Tensor):
        return [out]
    values = out.values() if isinstance(out, dict) else out
    return [tensor for value in values for tensor in flat(value)]


def random(model):
    """Give every weight a say: torchvision starts some heads at 0."""
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.kaiming_normal_(parameter)
    return model


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(flat(one), flat(two), strict=True))


# torchvision's densenet still asks for torch.jit decorations
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("build", "size"), MODELS.values(), ids=MODELS.keys())
def test_squash_changes_no_bit_of_the_output(build, size):
    model = random(build()).eval()
    x = torch.randn(2, 3, size, size)
    classes = [type(module) for module in model.modules()]
    keys, order = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    rows = ps.plan(model, 0.8)
    with torch.no_grad():
        dense = model(x)
        originals = {row.name: model.get_parameter(row.name).clone() for row in rows}
        ps.sparsify(model, 0.8)
        masks = {name: mask.clone() for name, mask in ps.named_masks(model)}
        sparse = model(x)
        twin = ps.squash(copy.deepcopy(model))
        assert same(twin(x), sparse)
        assert same(model(x), sparse)  # the copy's squash left it whole
        assert ps.is_sparse(model)
        ps.squash(model)
        assert same(model(x), sparse)
        assert not same(sparse, dense)
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_parameters()] == order
    for row in rows:
        weight = model.get_parameter(row.name)
        selected = torch.where(masks[row.name], originals[row.name], 0.0)
        assert torch.equal(weight.view(torch.int32), selected.view(torch.int32))
        assert int((weight != 0).sum()) <= row.kept == weight.numel() - round(0.8 * weight.numel())


def test_a_detection_model_says_something_to_compare():
    torch.manual_seed(0)
    build, size = MODELS["detection_ssdlite"]
    with torch.no_grad():
        out = ps.sparsify(random(build()).eval(), 0.8)(torch.randn(2, 3, size, size))
    assert len(flat(out)) == 6
    assert flat(out)[0].numel() > 0


def test_the_page_of_models_names_the_model():
    assert check("shufflenet_v2_x0_5").name == "shufflenet_v2_x0_5"
