"""The examples run as programs do, on a few images made here."""

import gzip
import importlib
import re
import statistics
import struct
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def mnist(tmp_path):
    """Some images in MNIST's own format, one file of them gzipped."""
    generator = torch.Generator().manual_seed(0)
    for part, number in (("train", 400), ("t10k", 200)):
        labels = torch.randint(10, (number,), generator=generator)
        images = torch.randint(60, (number, 28, 28), generator=generator)
        images[torch.arange(number), labels * 2 + 4] = 255  # a line whose height is the digit
        arrays = {f"{part}-images-idx3-ubyte": images, f"{part}-labels-idx1-ubyte": labels}
        for name, array in arrays.items():
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            data = header + array.to(torch.uint8).numpy().tobytes()
            if part == "train":
                (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data))
            else:
                (tmp_path / name).write_bytes(data)
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys):
    """Return `run(name, *arguments)`: what the example prints."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def run(name, *arguments):
        importlib.import_module(name).main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run


def test_sparse_momentum_on_mnist_trains_logs_draws_and_summarizes(mnist, run):
    out = mnist / "out"
    common = ["--data", mnist, "--out", out, "--model", "lenet300-100", "--batch-size", 20]
    shown = run("mnist_sparse_momentum", *common, "--epochs", 6, "--iters", 2, "--dense")
    logs = sorted(out.glob("lenet300-100-sparse-seed*.log"))
    assert [log.name[-6:-4] for log in logs] == ["17", "18"]
    assert "final density 0.0500" in logs[0].read_text()
    assert len(re.findall(r"^epoch \d/6: ", logs[0].read_text(), re.MULTILINE)) == 6
    assert (out / "lenet300-100-seed18.png").stat().st_size > 1_000
    reached = [float(re.search(r"test: accuracy (\S+),", log.read_text())[1]) for log in logs]
    assert statistics.mean(reached) > 0.5  # a tenth by chance
    summary = run("mnist_sparse_momentum", "--summarize", *logs)
    mean, error = statistics.mean(reached), statistics.stdev(reached) / 2**0.5
    assert f"Accuracy. Median: {mean:.5f}, Mean: {mean:.5f}" in summary
    assert f"Standard Error: {error:.5f}, Sample size: 2, 95% CI: (" in summary
    assert f"({mean - 1.96 * error:.5f},{mean + 1.96 * error:.5f})" in summary
    assert "dense, lenet300-100, 6 epochs" in shown


def test_the_tutorials_functions_and_functions_by_module_have_their_names(mnist, run):
    arguments = [
        *("--data", mnist, "--out", mnist / "out", "--model", "lenet5", "--epochs", 3),
        *("--optimizer", "adam", "--lr", 0.001, "--prune", "magnitude_variance", "--verbose"),
        *("--redistribution", "sparse_learning_moves:variance_redistribution"),
        *("--growth", "gradient"),
        *("--every", 7),
    ]
    shown = run("mnist_sparse_momentum", *arguments)
    assert "Update(step=" in shown
    assert "final density 0.0500" in shown


def test_continuous_sparsification_finds_a_ticket_and_squashes_it(mnist, run):
    out = mnist / "out"
    arguments = ["--epochs", 2, "--train-size", 256, "--val-set-size", 100, "--lmbda", 1e-4]
    shown = run("continuous_sparsification", "--data", mnist, "--out", out, *arguments)
    assert "round 2: epoch 2/2" in shown
    assert "ticket: epoch 2/2" in shown
    assert float(re.search(r"changes outputs by (\S+) at most", shown)[1]) < 1e-4
    assert 0 <= float(re.search(r"with (\S+) of the weights", shown)[1]) < 1
    assert (out / "continuous_sparsification.png").stat().st_size > 1_000


def test_relevance_masks_real_and_complex_networks(mnist, run):
    shown = run("relevance", "--data", mnist, "--train-size", 300, "--epochs", 2)
    found = re.findall(r"^(real|complex) +(.*?) +sparsity (0\.\d+), test", shown, re.MULTILINE)
    assert [kind for kind, *_ in found] == ["real", "real", "complex", "complex"]


def test_shrink_prunes_channels_and_removes_them(mnist, run):
    out = mnist / "out"
    arguments = ["--data", mnist, "--out", out, "--epochs", 5, "--sparsity", 0.5]
    shown = run("shrink", *arguments)
    assert float(re.search(r"changes outputs by (\S+) at most", shown)[1]) < 1e-4
    accuracies = dict(re.findall(r"^accuracy, (\S+): (\S+)$", shown, re.MULTILINE))
    assert list(accuracies) == ["dense", "masked", "small", "fine-tuned"]
    assert accuracies["masked"] == accuracies["small"]
    assert float(accuracies["fine-tuned"]) > 0.5  # a tenth by chance
    sizes = [(out / f"{name}.onnx").stat().st_size for name in ("small", "dense")]
    assert sizes[0] < 0.4 * sizes[1]
    assert (out / "shrink.png").stat().st_size > 1_000


@pytest.mark.parametrize("seed", range(3))
def test_what_the_demo_prunes_is_as_good_as_dense_after_fine_tuning(seed, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    reached = importlib.import_module("quickstart").recipe(seed)
    assert reached.dense > 0.9  # a tenth by chance
    assert reached.fine_tuned >= reached.dense - 0.02


def test_what_is_missing_is_said(tmp_path, run):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\1\0")
    with pytest.raises(SystemExit, match=r"hold train-labels-idx1-ubyte or train-labels-idx1-ub"):
        run("mnist_sparse_momentum", "--data", tmp_path, "--out", tmp_path)
    unfinished = tmp_path / "some.log"
    unfinished.write_text("epoch 1/2: ...\n")
    with pytest.raises(SystemExit, match="must be the log of a run that ended"):
        run("mnist_sparse_momentum", "--summarize", unfinished)


def test_the_pictures_of_the_documentation_are_drawn(tmp_path, run):
    shown = run("pictures", tmp_path)
    accuracies = [float(found) for found in re.findall(r"accuracy (\S+),", shown)]
    assert len(accuracies) == 2
    assert min(accuracies) > 0.9  # a tenth by chance
    names = {path.name for path in (EXAMPLES.parent / "docs" / "images").glob("*.png")}
    assert {path.name for path in tmp_path.glob("*.png")} == names


def test_updates_of_one_shot_pruning_are_compared(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    errors = importlib.import_module("one_shot_errors").errors(outputs=8, inputs=16, samples=60)
    assert {len(row) for row in errors.values()} == {4}
    for magnitude, sparsegpt, admm in zip(
        *(errors[n] for n in ("magnitude", "SparseGPT", "ADMM")), strict=True
    ):
        assert admm < sparsegpt < magnitude


def test_a_network_from_meta_is_trained_by_set(mnist, run):
    arguments = ["--neurons", 2000, "--steps", 3]
    for data in ([], ["--data", mnist]):
        shown = run("million_neurons", *arguments, *data)
        assert "2,011 neurons" in shown
        assert "dense weights would have" in shown
        assert "step 3/3: loss" in shown
        assert "peak memory" in shown


def test_a_language_model_is_pruned_in_several_ways(tmp_path, run):
    few = ["--steps", 2, "--sequences", 8, "--reconstruct", 2, "--seeds", 1, "--out", tmp_path]
    methods = ["magnitude", "SparseGPT", "ADMM"]
    shown = run("prune_language_model", *few, "--methods", *methods, "--sparsities", "50%")
    assert re.search(r"\nADMM, reconstruct +\d+\.\d{3}\n", shown)
    assert re.search(r"relative to that of SparseGPT\n(.+\n)*SparseGPT +1\.00\n", shown)
