"""The shape of the package: which way imports point, what importing it brings."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import parasparse as ps

ROOT = Path(ps.__file__).parent
PURE = {
    "scores.entries", "scores.saliency", "scores.statistics", "patterns", "distributions",
    "schedules", "gates",
}  # fmt: skip
ALLOWED = {
    "_checks": set(),
    "_parts": set(),
    "_apply_mask": {"_parts"},
    "_foreign": set(),
    "_tables": set(),
    "_snapshot": set(),
    "_hooks": set(),
    "_held": set(),
    "scores.entries": set(),
    "scores.products": set(),
    "scores.synaptic_flow": {"scores.products"},
    "_fsdp": set(),
    "scores.statistics": {"_checks", "_fsdp", "_parts", "scores.products", "scores.synaptic_flow"},
    "scores.saliency": {"scores.products", "scores.statistics"},
    "_reduced": {"_apply_mask", "_parts", "_stack", "parametrizations"},
    "scores.collecting": {
        "_attach", "_checks", "_fsdp", "_reduced", "_stack", "_tensors", "contexts",
        "parametrizations", "scores.products", "scores.statistics", "targets",
    },
    "_sources": {"_parts"},
    "_histograms": {"_parts", "_sources"},
    "_select": {"_histograms", "_parts", "_sources"},
    "_units": {"_checks", "_select", "_sources"},
    "_without_sparsity": {"_sources", "_units"},
    "patterns": {"_checks", "_parts", "_select", "_units", "_without_sparsity"},
    "distributions": {"_checks"},
    "schedules": set(),
    "gates": {"_checks", "_parts"},
    "parametrizations": {"_apply_mask", "_hooks", "_parts"},
    "soft_mask": {"_apply_mask", "_checks", "_units", "gates"},
    "_any_names": set(),
    "_stand_in": set(),
    "_stack": {"_any_names", "_apply_mask"},
    "_pair_stack": {"_parts", "_stack"},
    "cli.checkpoint": set(),
    "cli.progress": set(),
    "cli.rules": {"cli.checkpoint", "distributions", "patterns", "scores.entries", "treatments"},
    "cli.safetensors_files": {"cli.checkpoint", "sparse._safetensors"},
    "cli.contents": {"cli.checkpoint"},
    "cli.torch_files": {"cli.checkpoint", "cli.contents"},
    "cli.opening": {
        "cli.checkpoint", "cli.safetensors_files", "cli.torch_files", "sparse._headers",
        "sparse.files",
    },
    "cli.layout": {"_apply_mask", "cli.checkpoint"},
    "cli.torch_writer": {
        "_tensors", "cli.checkpoint", "cli.contents", "cli.layout", "cli.torch_files",
        "sparse._replacing",
    },
    "cli.writing": {
        "cli.checkpoint", "cli.layout", "cli.safetensors_files", "cli.torch_writer",
        "sparse._bits", "sparse._replacing", "sparse._safetensors", "sparse.files",
    },
    "cli.folding": {"_tensors", "cli.checkpoint"},
    "cli.reaching": {"_tensors", "cli.checkpoint", "cli.folding", "cli.rules", "targets"},
    "_by_entry": {"_parts", "_select", "_sources", "scores.entries"},
    "cli.pruning": {
        "_by_entry", "_checks", "_pair_stack", "_select", "_sources", "_units", "cli.checkpoint",
        "cli.reaching", "patterns", "scores.entries", "treatments",
    },
    "cli.commands": {
        "_tables", "_units", "cli.checkpoint", "cli.folding", "cli.layout", "cli.opening",
        "cli.progress", "cli.pruning", "cli.reaching", "cli.rules", "cli.writing", "patterns",
        "sparse.files",
    },
    "cli.looking": {"_held", "_tables", "cli.checkpoint", "cli.opening", "cli.progress"},
    "cli.main": {"cli.checkpoint", "cli.commands", "cli.looking"},
    "__main__": {"cli.main"},
    "data.container": {"_apply_mask", "_stack"},
    "data.saved": set(),
    "data.given": set(),
    "data.torch_ao": set(),
    "data.base": {
        "_checks", "_foldable", "data.container", "data.given", "data.saved", "data.torch_ao",
    },
    "data.ready": {"_checks", "_units", "data.base", "patterns", "treatments"},
    "_masked_class": {"_hooks", "_stack"},
    "_dense_keys": {"_stack"},
    "_attach": {
        "_dense_keys", "_foreign", "_masked_class", "_pair_stack", "_stack",
    },
    "_tensors": {"_attach", "_pair_stack", "_stack"},
    "_foldable": {"_attach", "_checks", "_tensors"},
    "targets": {"_checks", "_tables", "_tensors"},
    "treatments": {
        "_by_entry", "_checks", "_parts", "_tables", "gates", "patterns", "scores.entries",
        "soft_mask",
    },
    "_alike": {"_parts"},
    "_resolve": { "_stand_in",
        "_alike", "_attach", "_checks", "_foreign", "_fsdp", "_parts", "_tables", "_tensors",
        "parametrizations", "patterns", "soft_mask", "targets", "treatments",
    },
    "transforms": { "_stand_in",
        "_attach", "_foldable", "_fsdp", "_pair_stack", "_parts", "_resolve", "_snapshot",
        "_tables", "_tensors", "parametrizations", "soft_mask", "targets",
    },
    "masks": { "_stand_in",
        "_attach", "_checks", "_fsdp", "_tensors", "parametrizations", "soft_mask", "targets",
    },
    "contexts": {"_attach", "_fsdp", "_parts", "_reduced", "_stack", "_tensors", "targets"},
    "report": {
        "_attach", "_held", "_parts", "_tables", "_tensors", "parametrizations", "soft_mask",
        "sparse.payoff", "targets",
    },
    "_found_masks": {"_tensors", "transforms", "treatments"},
    "state": {
        "_apply_mask", "_attach", "_checks", "_found_masks", "_fsdp", "_parts", "_stack",
        "_tensors", "parametrizations", "sparse._headers", "transforms",
    },
    "optim": {"_attach", "_checks", "_parts", "_tensors"},
    "training.history": {"_checks", "_parts", "_tensors"},
    "training.rules": {"_tables", "scores.entries", "treatments"},
    "training.masking": {"_checks", "_parts"},
    "training.moves": {"_parts", "_select", "training.masking"},
    "training.layer": {
        "_apply_mask", "_pair_stack", "_parts", "_tensors", "_units", "optim", "parametrizations",
        "patterns", "training.masking",
    },
    "training.start": {
        "_checks", "_parts", "_resolve", "_stack", "_tables", "_tensors", "_units", "distributions",
        "optim", "parametrizations", "patterns", "scores.entries", "targets", "training.layer",
        "training.moves", "training.rules", "training.update", "treatments",
    },
    "training.update": {"_checks", "_parts", "patterns", "training.masking", "training.moves"},
    "training.dynamic": {
        "_alike", "_fsdp", "_parts", "contexts", "optim", "schedules", "training.history",
        "training.layer", "training.masking", "training.start", "training.update", "transforms",
    },
    "training.methods": {"schedules", "training.dynamic", "training.start"},
    "training.rewinding": {"_attach"},
    "training.continuous": {
        "_checks", "_parts", "_resolve", "gates", "soft_mask", "targets", "training.history",
        "training.rewinding", "transforms",
    },
    "training.tickets": {
        "_checks", "_resolve", "optim", "scores.entries", "targets", "training.history",
        "training.rewinding", "training.rules", "transforms", "treatments",
    },
    "training.gradual": {
        "_checks", "_fsdp", "_resolve", "_tensors", "optim", "schedules", "targets",
        "training.history", "training.rules", "transforms",
    },
    "sparse.compressed": set(),
    "sparse.regular": set(),
    "sparse.formats": {"sparse.compressed", "sparse.regular"},
    "sparse.compiled": {"sparse.compressed", "sparse.formats"},
    "sparse.layers": {"_apply_mask", "sparse.compiled", "sparse.formats", "sparse.regular"},
    "sparse.attention": set(),
    "sparse.recurrent": {"sparse.layers"},
    "sparse.weight": {
        "_stand_in", "sparse.attention", "sparse.formats", "sparse.layers", "sparse.recurrent",
    },
    "sparse.measure": {"sparse.layers", "sparse.weight"},
    "sparse.places": {"_attach", "_stack", "_tensors", "sparse.weight"},
    "sparse.acceleration": {"_tables"},
    "sparse.choose": {
        "_tensors", "sparse.acceleration", "sparse.measure", "sparse.places", "sparse.weight",
    },
    "sparse.plans": {"_checks", "sparse.acceleration", "sparse.choose", "sparse.formats"},
    "sparse.accelerate": { "_stand_in",
        "_attach", "_checks", "_parts", "_tensors", "sparse.acceleration", "sparse.choose",
        "sparse.places", "sparse.plans", "sparse.regular", "sparse.weight",
    },
    "sparse._bits": set(),
    "sparse._replacing": set(),
    "sparse._safetensors": set(),
    "sparse.packing": {"sparse._bits"},
    "sparse._headers": set(),
    "sparse.files": {
        "sparse._bits", "sparse._headers", "sparse._replacing", "sparse._safetensors",
        "sparse.packing", "state",
    },
    "sparse.payoff": {
        "_tensors", "sparse.formats", "sparse.layers", "sparse.measure", "sparse.packing",
        "sparse.places", "sparse.weight",
    },
    "_pictured": {"_parts", "_tensors", "scores.entries", "soft_mask"},
    "_picture": set(),
    "_labels": set(),
    "plots": {
        "_checks", "_fsdp", "_labels", "_picture", "_pictured", "_tensors", "scores.entries",
        "targets", "training.history",
    },
    "integrations._metrics": {"training.history"},
    "integrations._going_on": {"_checks", "_digests", "_found_masks", "masks", "optim"},
    "integrations.lightning": {"integrations._going_on", "integrations._metrics"},
    "integrations.transformers": {"integrations._going_on", "targets"},
    "integrations.tensorboard": {"integrations._metrics"},
    "integrations.peft": {
        "_attach", "_checks", "_tensors", "parametrizations", "targets", "transforms",
    },
    "_digests": {"_parts", "sparse._bits"},
    "distributed": {"_checks", "_digests", "_fsdp", "_parts", "parametrizations", "targets"},
}  # fmt: skip


PACKAGES = ("parasparse", "parasparse.sparse", "parasparse.cli", "parasparse.integrations")
FILES = [path for path in ROOT.rglob("*.py") if path.stem != "__init__"]


def imports(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in PACKAGES:
            inside = node.module.removeprefix("parasparse").removeprefix(".")
            found |= {f"{inside}.{alias.name}".removeprefix(".") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("parasparse."):
            found.add(node.module.removeprefix("parasparse."))
    return found


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_imports_point_one_way():
    modules = {name_of(path): imports(path) for path in FILES}
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
            for node in ast.walk(ast.parse((ROOT / f"{name.replace('.', '/')}.py").read_text()))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }


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
        assert getattr(ps, name).__doc__


def test_every_test_that_a_workaround_names_exists():
    tests = "".join(path.read_text() for path in Path(__file__).parent.rglob("*.py"))
    for path in ROOT.rglob("*.py"):
        for named in re.findall(r"[( ]((?:test|ddp|fsdp2)_\w+)[),]", path.read_text()):
            assert f"def {named}(" in tests, (path.name, named)


def test_files_keep_to_one_job():
    for path in ROOT.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 300, path.name
