"""Controllers go on after a cut, or say that their masks are gone."""

import pytest
import torch

import parasparse as ps
from tests.shrink.test_lives_with_the_model import images, network, step
from tests.shrink.test_shrink import filters


@pytest.mark.parametrize("stop", [2, 20])
def test_a_controller_that_is_over_goes_on_and_another_says_that_its_masks_are_gone(stop):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    schedule = ps.schedules.Linear(0.0, 1.0, stop=stop)
    controller = ps.GradualPruning(
        model, {"5": filters(0.5)}, optimizer, schedule=schedule, every=2
    )
    for _ in range(12):
        step(model, optimizer, images(4))
        controller.step()
    ps.shrink(model, images(), optimizer=optimizer)
    step(model, optimizer, images(4))
    if stop == 20:
        with pytest.raises(RuntimeError, match="Create a new controller"):
            for _ in range(2):
                controller.step()
    else:
        controller.step()


CONTROLLERS = {
    "gradual": lambda model, optimizer: ps.GradualPruning(
        model, {"5": 0.5}, optimizer, schedule=ps.schedules.Linear(0.0, 1.0, stop=20), every=2
    ),
    "rigl": lambda model, optimizer: ps.rigl(model, {"5": 0.5}, optimizer, every=2, stop=100),
}


@pytest.mark.parametrize("name", CONTROLLERS)
def test_a_controller_whose_masks_have_been_cut_says_so_before_it_changes_them(name):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    controller = CONTROLLERS[name](model, optimizer)
    for _ in range(2):
        step(model, optimizer, images(4))
        controller.step()
    ps.sparsify(model, {"3": filters(0.5)})
    ps.shrink(model, images(), optimizer=optimizer)
    mask = ps.mask_of(model, "5.weight").clone()
    with pytest.raises(RuntimeError, match="Create a new controller after `shrink`"):
        for _ in range(3):
            step(model, optimizer, images(4))
            controller.step()
    assert torch.equal(ps.mask_of(model, "5.weight"), mask)
    controller.close()
    controller = CONTROLLERS[name](model, optimizer)
    for _ in range(3):
        step(model, optimizer, images(4))
        controller.step()
