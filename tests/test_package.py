"""The shape of the package: which way imports point, what importing it brings."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import parasparse as ps

ROOT = Path(ps.__file__).parent
PURE = {"scores", "patterns", "distributions", "gates"}
ALLOWED = {
    "_checks": set(),
    "_apply_mask": set(),
    "_foreign": set(),
    "_tables": set(),
    "_snapshot": set(),
    "_hooks": set(),
    "_held": set(),
    "scores": {"_checks"},
    "_select": set(),
    "_units": {"_checks", "_select"},
    "patterns": {"_checks", "_select", "_units"},
    "distributions": {"_checks"},
    "gates": {"_checks"},
    "parametrizations": {"gates", "_apply_mask", "_hooks"},
    "_stack": {"_apply_mask"},
    "_masked_class": {"_hooks", "_stack"},
    "_dense_keys": {"_stack"},
    "_attach": {"_stack", "_masked_class", "_dense_keys", "_foreign"},
    "_tensors": {"_attach"},
    "targets": {"_checks", "_tables", "_tensors"},
    "treatments": {"_checks", "_tables", "scores", "patterns", "parametrizations"},
    "_resolve": {
        "_attach", "_checks", "_foreign", "_tables", "_tensors", "parametrizations", "targets",
        "treatments",
    },
    "transforms": {
        "_attach", "_checks", "_resolve", "_snapshot", "_stack", "_tables", "_tensors",
        "parametrizations", "targets",
    },
    "masks": {"_attach", "_checks", "_tensors", "parametrizations", "targets"},
    "contexts": {"_attach", "_stack", "_tensors", "targets"},
    "report": {"_attach", "_held", "_tables", "_tensors", "parametrizations", "targets"},
    "state": {
        "_apply_mask", "_attach", "_checks", "_stack", "_tensors", "parametrizations", "transforms",
        "treatments",
    },
}  # fmt: skip


def imports(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "parasparse":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("parasparse."):
            found.add(node.module.split(".")[1])
    return found


def test_imports_point_one_way():
    modules = {path.stem: imports(path) for path in ROOT.glob("*.py") if path.stem != "__init__"}
    assert modules.keys() == ALLOWED.keys()
    for name, found in modules.items():
        assert found <= ALLOWED[name], name
    order = []
    while len(order) < len(ALLOWED):  # the table itself has no cycle
        free = [n for n in ALLOWED if n not in order and ALLOWED[n] <= set(order)]
        assert free
        order += free


def test_the_pure_row_knows_no_modules():
    for name in PURE:
        assert "nn" not in {
            alias.name
            for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text()))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }


def test_importing_brings_no_extra():
    extras = ["torchvision", "matplotlib", "safetensors", "rich", "lightning", "transformers"]
    code = f"import sys, parasparse; print([m for m in {extras} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_public_name_is_there_and_documented():
    for name in ps.__all__:
        assert getattr(ps, name).__doc__


def test_every_test_that_a_workaround_names_exists():
    tests = "".join(path.read_text() for path in Path(__file__).parent.rglob("*.py"))
    for path in ROOT.glob("*.py"):
        for named in re.findall(r"[( ]((?:test|ddp)_\w+)[),]", path.read_text()):
            assert f"def {named}(" in tests, (path.name, named)


def test_files_keep_to_one_job():
    for path in ROOT.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 300, path.name
