"""What the pictures show, read back from their artists."""

import pickle
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import parasparse as ps
from tests.helpers.processes import Program


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(64, 96))


def pictured(figure):
    """Return the axes with a tensor in them, by title."""
    return {axes.get_title(): axes for axes in figure.axes if axes.get_title()}


def test_bars_are_the_shares_of_zeros():
    model = ps.sparsify(net(), {"0": 0.25, "2": 0.9})
    figure = ps.plot(model)
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    zeros = [float((layer.weight == 0).double().mean()) for layer in (model[0], model[2])]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(zeros)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.weight", "2.weight"]
    assert {text.get_text() for text in axes.texts} == {f"{share:.1%}" for share in zeros}
    kept = sum(int(mask.sum()) for _, mask in ps.named_masks(model))
    assert f"{1 - kept / (216 + 6144):.2%} of 6,360" in figure.get_suptitle()


def test_targets_choose_what_is_shown():
    model = ps.sparsify(net(), 0.5)
    assert list(pictured(ps.plot(model, kind="masks", targets="2.*"))) == ["2"]
    with pytest.raises(ValueError, match=r"`targets` must each reach a masked tensor"):
        ps.plot(model, targets="3.*")


def test_a_layer_that_is_all_but_empty_does_not_read_as_empty():
    model = ps.sparsify(nn.Linear(100, 100), {"weight": torch.arange(10_000).view(100, 100) == 0})
    assert ps.plot(model).axes[0].texts[0].get_text() == "> 99.9%"


def test_cells_are_the_means_of_a_mask():
    mask = torch.rand(96, 144, generator=torch.Generator().manual_seed(0)) < 0.3
    model = ps.sparsify(nn.Linear(144, 96), {"weight": mask})
    (image,) = ps.plot(model, kind="masks").axes[0].images
    expected = mask.float().view(48, 2, 48, 3).mean((1, 3))
    np.testing.assert_allclose(image.get_array(), expected, rtol=1e-5)

    small = ps.sparsify(nn.Conv2d(2, 4, 3), 0.5)
    (image,) = ps.plot(small, kind="masks").axes[0].images
    shown = np.asarray(image.get_array())
    np.testing.assert_array_equal(shown, ps.mask_of(small, "weight").flatten(1).float())


@pytest.mark.parametrize("shape", [(7,), (1, 1), (50, 1), (1, 50), (3, 0), (49, 97)])
def test_masks_of_any_shape_have_a_picture(shape):
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(shape))
    ps.sparsify(model, {"weight": torch.ones(shape, dtype=torch.bool)})
    (image,) = ps.plot(model, kind="masks").axes[0].images
    assert max(image.get_array().shape) <= 48
    if model.weight.numel():
        assert np.asarray(image.get_array()).mean() == pytest.approx(1.0)


def test_scores_are_split_by_the_mask():
    model = ps.sparsify(net(), {"2": ps.Prune(0.9)})
    figure = ps.plot(model, kind="scores")
    (axes,) = pictured(figure).values()
    dropped, both = axes.patches
    mask, weight = ps.mask_of(model, "2.weight"), ps.stored(model, "2.weight").detach()
    counts = dropped.get_data().values.sum(), both.get_data().values.sum()
    assert counts == (int((~mask).sum()), mask.numel())
    (line,) = axes.lines
    assert line.get_xdata()[0] == float(weight.abs()[mask].min())
    edges = both.get_data().edges
    assert edges[0] == pytest.approx(float(weight.abs().min()))
    assert edges[-1] == pytest.approx(float(weight.abs().max()))


def test_dropped_entries_that_are_stored_as_0_are_no_column_of_the_scores():
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    ps.sparse_momentum(model, 0.75, optimizer, stop=10)
    dropped, both = ps.plot(model, kind="scores").axes[0].patches
    assert dropped.get_data().values.sum() == 0
    assert both.get_data().values.sum() == 16


def test_scores_may_be_ones_own():
    model = ps.sparsify(nn.Linear(4, 4), 0.5)
    seen = []

    def score(tensor, name):
        seen.append(name)
        return torch.arange(16.0).view(4, 4)

    axes = ps.plot(model, kind="scores", score=score).axes[0]
    assert seen == ["weight"]
    assert axes.patches[0].get_data().edges[-1] == 15


@pytest.mark.parametrize("value", [2.0, 1e300, 1e-300, float("nan"), float("inf")])
def test_scores_of_any_size_are_counted_if_they_are_finite(value):
    model = ps.sparsify(nn.Linear(4, 4, dtype=torch.float64), 0.5)
    with torch.no_grad():
        ps.stored(model, "weight").fill_(value)[0] = 3.0
    both = ps.plot(model, kind="scores").axes[0].patches[1]
    assert both.get_data().values.sum() == (16 if value < float("inf") else 4)


def test_more_scores_than_a_float_counts_are_counted():
    weight = torch.ones(4097, 4096)
    weight[0, 0] = 2.0
    model = nn.Module()
    model.weight = nn.Parameter(weight)
    ps.sparsify(model, {"weight": torch.ones_like(weight, dtype=torch.bool)})
    both = ps.plot(model, kind="scores").axes[0].patches[1]
    assert both.get_data().values.sum() == 4097 * 4096


def test_scores_are_in_the_bins_that_numpy_puts_them_in():
    model = ps.sparsify(net(), {"2": 0.0})
    both = ps.plot(model, kind="scores").axes[0].patches[1].get_data()
    magnitudes = ps.stored(model, "2.weight").detach().abs().double().numpy().ravel()
    expected, edges = np.histogram(magnitudes, bins=50)
    np.testing.assert_allclose(both.edges, edges)
    assert np.abs(both.values - expected).sum() <= 4  # those that lie on an edge


@pytest.mark.parametrize("kind", ["sparsity", "masks", "scores"])
@pytest.mark.parametrize(
    "gate",
    ["sigmoid", "hard_concrete", "straight_through", "soft_threshold", "variational_dropout"],
)
@pytest.mark.parametrize("pattern", [None, ps.patterns.channel(0)])
def test_learned_masks_are_shown_as_binarize_makes_them(gate, kind, pattern):
    if pattern is not None and gate == "variational_dropout":
        pattern = None  # which has no units
    share = 0.5 if gate == "straight_through" else None
    treatment = ps.Gate(getattr(ps.gates, gate), pattern=pattern, sparsity=share)
    model = ps.sparsify(nn.Linear(6, 8), treatment)
    with torch.no_grad():
        logits = model.parametrizations.weight[0].logits
        logits.copy_(torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)) * 4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    figure = ps.plot(model, kind=kind)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if kind == "sparsity":
        width = figure.axes[0].patches[0].get_width()
        hard = ps.binarize(model)
        assert width == pytest.approx(float((hard.weight == 0).double().mean()))
    elif kind == "masks":
        shown = np.asarray(figure.axes[0].images[0].get_array())
        soft = model.parametrizations.weight[0]
        is_value = gate in ("sigmoid", "hard_concrete", "straight_through")
        expected = soft.eval().mask if is_value else ps.binarize(model).weight != 0
        np.testing.assert_allclose(shown, expected.detach().float(), rtol=1e-5)
    else:
        kept, both = (patch.get_data().values.sum() for patch in figure.axes[0].patches)
        hard = ps.mask_of(ps.binarize(model), "weight")
        assert both - kept == int(hard.sum())


def test_pairs_complex_and_unset_masks():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight_re, self.weight_im = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))

    model = nn.ModuleList([Pair(), nn.Linear(4, 4, dtype=torch.cfloat), nn.Linear(4, 4)])
    ps.sparsify(model, {"0": 0.5, "1": 0.25, "2": ps.Fixed(None)})
    axes = ps.plot(model).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [0.5, 0.25, 0.0]
    assert [text.get_text() for text in axes.texts] == ["50.0%", "25.0%", "not set"]
    for kind in ("masks", "scores"):
        assert [
            text.get_text() for axes in ps.plot(model, kind=kind).axes for text in axes.texts
        ] == ["not set"]


def controller(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return optimizer, ps.sparse_momentum(model, 0.8, optimizer, stop=40, every=10)


def test_a_history_is_drawn_by_step():
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    optimizer, dst = controller(model)
    for _ in range(40):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        dst.step()
    figure = ps.plot(dst, accuracy={10: 0.5, 40: 0.75})
    top, middle, bottom = figure.axes
    lines = {line.get_label(): line for line in (*top.lines, *middle.lines)}
    assert set(lines) == {
        "0.weight",
        "1.weight",
        "all together",
        "churn",
        "overlap with the first masks",
    }
    for line in lines.values():
        assert list(line.get_xdata()) == [10, 20, 30, 40]
    shares = [update.sparsity["1.weight"] for update in dst.history]
    assert list(lines["1.weight"].get_ydata()) == shares
    assert list(lines["all together"].get_ydata()) == pytest.approx([0.8] * 4, abs=0.01)
    assert list(lines["churn"].get_ydata()) == [update.churn for update in dst.history]
    assert [*map(float, bottom.lines[0].get_ydata())] == [0.5, 0.75]
    assert len(ps.plot(dst).axes) == 2


def test_rounds_are_drawn_one_after_the_other():
    model = nn.Linear(10, 10)
    lottery = ps.LotteryTicket(model, 0.9, rounds=3)
    for _ in range(3):
        for _ in range(5):
            lottery.step()
        lottery.prune()
    top, middle = ps.plot(lottery).axes
    assert list(top.lines[0].get_xdata()) == [1, 2, 3]
    assert middle.get_xlabel() == "update"


def deep(number):
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(number)))


@pytest.mark.parametrize("kind", ["sparsity", "masks", "scores"])
def test_pictures_of_150_layers_are_readable(kind):
    """Names stand apart, in letters of 6 points or more, on a picture that a screen can show."""
    model = nn.ModuleDict({f"encoder_block_number_{n // 2}": deep(2) for n in range(0, 150, 2)})
    figure = ps.plot(ps.sparsify(model, 0.5), kind=kind)
    width, height = figure.get_size_inches()
    assert width <= 26
    assert height <= 14
    figure.canvas.draw()
    names = [axes.title for axes in figure.axes if axes.get_title()]
    names = names or [label for axes in figure.axes for label in axes.get_yticklabels()]
    assert len(names) == 150
    assert min(name.get_fontsize() for name in names) >= 6
    boxes = [name.get_window_extent() for name in names]
    bars = [text.get_window_extent() for axes in figure.axes for text in axes.texts]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in (*boxes[i + 1 :], *bars))


def test_names_of_a_real_network_stay_apart():
    names = [f"bert.encoder.layer.{i}.{part}" for i in range(12) for part in (
        "attention.self.query", "attention.self.key", "attention.output.dense",
        "intermediate.dense", "output.dense",
    )]  # fmt: skip
    model = nn.Module()
    for name in names:
        place = model
        for part in name.split("."):
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        place.weight = nn.Parameter(torch.randn(2, 2))
    titles = list(pictured(ps.plot(ps.sparsify(model, 0.5), kind="masks")))
    assert len(set(titles)) == len(names)
    assert "b.e.l.11.a.self.query" in titles


@pytest.mark.parametrize("kind", ["sparsity", "masks", "scores"])
def test_names_that_matplotlib_would_read_otherwise_are_drawn(kind):
    model = nn.ModuleDict({r"$\bad$": nn.Linear(2, 2), "_$": nn.Linear(2, 2)})
    ps.plot(ps.sparsify(model, 0.5), kind=kind).canvas.draw()


def test_names_that_begin_with_a_line_are_in_the_legend():
    model = nn.ModuleDict({"_net": nn.Linear(2, 2), "$net$": nn.Linear(2, 2)})
    pruner = ps.GradualPruning(model, 0.5, schedule=ps.schedules.Linear(0.0, 1.0, stop=2), every=2)
    pruner.step(), pruner.step()
    figure = ps.plot(pruner)
    figure.canvas.draw()
    named = [text.get_text().strip() for text in figure.axes[0].get_legend().get_texts()]
    assert named == ["_net.weight", r"\$net\$.weight", "all together"]


def test_pictures_are_pickled():
    figure = pickle.loads(pickle.dumps(ps.plot(ps.sparsify(nn.Linear(4, 4), 0.5))))
    assert figure.axes[0].patches[0].get_width() == 0.5


def test_a_history_of_150_layers_names_the_first_and_the_last():
    model = deep(150)
    pruner = ps.GradualPruning(model, 0.5, schedule=ps.schedules.Linear(0.0, 1.0, stop=4), every=2)
    for _ in range(4):
        pruner.step()
    top = ps.plot(pruner).axes[0]
    assert len(top.lines) == 151
    named = [text.get_text() for text in top.get_legend().get_texts()]
    assert named == ["0.weight", "149.weight", "all together"]


def draw_without_pyplot():
    assert "matplotlib.pyplot" not in sys.modules
    figure = ps.plot(ps.sparsify(nn.Linear(4, 4), 0.5))
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.xdist_group("processes")
def test_notebooks_show_it_and_pyplot_does_not_hold_it(tmp_path):
    code, _, error = Program(tmp_path, draw_without_pyplot).finished()
    assert code == 0, error


def test_without_matplotlib_the_error_says_what_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "parasparse.report.plot_figure", raising=False)
    with pytest.raises(ImportError) as raised:
        ps.plot(ps.sparsify(nn.Linear(4, 4), 0.5))
    assert 'pip install "parasparse[plot]"' in raised.value.__notes__[0]


@pytest.mark.parametrize(
    ("subject", "options", "error", "message"),
    [
        (lambda: nn.Linear(4, 4), {}, ValueError, "this model has none"),
        (lambda: 3, {}, TypeError, "must be a model or a controller; got int"),
        (lambda: ps.sparsify(nn.Linear(4, 4), 0.5), {"kind": "mask"}, ValueError, '"masks"'),
        (
            lambda: ps.sparsify(nn.Linear(4, 4), 0.5),
            {"score": ps.scores.magnitude},
            ValueError,
            '"score" must not be given for kind="sparsity"',
        ),
        (
            lambda: ps.sparsify(nn.Linear(4, 4), 0.5),
            {"kind": "scores", "score": lambda tensor, name: tensor.sum(0)},
            ValueError,
            "one score per entry",
        ),
        (
            lambda: ps.LotteryTicket(nn.Linear(4, 4), 0.5, rounds=1),
            {"accuracy": [0.5]},
            TypeError,
            "must map steps",
        ),
        (
            lambda: ps.sparsify(nn.Linear(4, 4, device="meta"), {"weight": ps.Fixed(None)}),
            {},
            ValueError,
            "meta device",
        ),
        (lambda: ps.LotteryTicket(nn.Linear(4, 4), 0.5, rounds=1), {}, ValueError, "is empty"),
        (
            lambda: ps.LotteryTicket(nn.Linear(4, 4), 0.5, rounds=1),
            {"targets": "weight"},
            ValueError,
            '"targets" must not be given for kind="history"',
        ),
        (
            lambda: ps.LotteryTicket(nn.Linear(4, 4), 0.5, rounds=1),
            {"kind": "masks"},
            ValueError,
            '"history"',
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused(subject, options, error, message):
    with pytest.raises(error, match=message):
        ps.plot(subject(), **options)
