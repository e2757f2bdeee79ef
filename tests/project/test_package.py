"""The shape of the package: which way imports point, what importing it brings."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import parasparse as ps

ROOT = Path(ps.__file__).parent

# A room imports from the lines above its own, and from its own files.
ORDER = """
    counts dtypes text names schedules sharding
    distributions gates patterns
    masks
    attach files
    targets
    scores acceleration optim distributed
    rules
    verbs
    checkpoints training data_sparsifiers shrink oneshot
    report integrations
    cli
    __init__ __main__
"""
FLOOR = {room: floor for floor, line in enumerate(ORDER.splitlines()) for room in line.split()}
# Numbers and tensors: no modules.
PURE = (
    "counts dtypes text names schedules distributions gates patterns scores.weights_alone "
    "scores.saliency"
)


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): ast.parse(path.read_text()) for path in ROOT.rglob("*.py")}


def room_of(name):
    return name.split(".")[0]


def imports(tree):
    """The files of parasparse from which a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and room_of(node.module or "") == "parasparse":
            source = node.module.removeprefix("parasparse").removeprefix(".")
            for alias in node.names:
                inside = f"{source}.{alias.name}".removeprefix(".")
                yield inside if inside in FILES else source


def test_every_room_has_its_floor():
    assert {room_of(name) for name in FILES} == FLOOR.keys()


def test_imports_point_one_way():
    for name, tree in FILES.items():
        for source in imports(tree):
            lower = FLOOR[room_of(source)] < FLOOR[room_of(name)]
            assert lower or room_of(source) == room_of(name), (name, source)


def test_no_circle_within_a_room():
    circles = {name: [s for s in imports(tree) if s != name] for name, tree in FILES.items()}
    list(TopologicalSorter(circles).static_order())  # raises CycleError


def test_no_file_has_an_underscore():
    for name in FILES:
        assert not re.search(r"(^|\.)_(?!_(init|main)__$)", name), name


def test_the_pure_row_knows_no_modules():
    for name, tree in FILES.items():
        if any(name == pure or name.startswith(f"{pure}.") for pure in PURE.split()):
            assert "nn" not in {
                alias.name
                for node in ast.walk(tree)
                if isinstance(node, ast.ImportFrom)
                for alias in node.names
            }, name


def test_importing_brings_no_extra():
    extras = [
        "torchvision", "matplotlib", "safetensors", "rich", "lightning", "transformers", "peft",
        "tensorboard", "onnx",
    ]  # fmt: skip
    code = f"import sys, parasparse; print([m for m in {extras} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_public_name_is_there_and_documented():
    for name in ps.__all__:
        assert getattr(ps, name).__doc__ or name == "Rules"  # a union has a string below it


def test_every_test_that_a_workaround_names_exists():
    tests = "".join(path.read_text() for path in Path(__file__).parents[1].rglob("*.py"))
    for path in ROOT.rglob("*.py"):
        for named in re.findall(r"[( ]((?:test|ddp|fsdp2)_\w+)[),]", path.read_text()):
            assert f"def {named}(" in tests, (path.name, named)


def lines_of_code(tree):
    """The lines that hold code: no docstrings, comments or blank lines."""
    texts = {
        (node.lineno, node.end_lineno)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    docs = {line for first, last in texts for line in range(first, last + 1)}
    return {
        line
        for node in ast.walk(tree)
        if hasattr(node, "lineno")
        for line in (node.lineno, node.end_lineno)
    } - docs


def test_files_keep_to_one_job():
    for name, tree in FILES.items():
        assert len(lines_of_code(tree)) <= 250, name
