"""Every Python block of README and of the documentation runs, page by page."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from parasparse.cli.main import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.filterwarnings("ignore")  # examples are not the place to silence torch
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_on_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    # Everything except code becomes empty lines, so an error names the line of the page.
    parts = re.split(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    code = "".join(
        part if number % 2 else "\n" * (part.count("\n") + 1) for number, part in enumerate(parts)
    )
    without_code = (
        "models.md", "zoo.md", "shrink-zoo.md", "one-shot-results.md", "packed-sizes.md"
    )  # fmt: skip
    if page.parent.name != "api" and page.name not in without_code:
        assert len(parts) > 1
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, str(page), "exec"), {"__name__": "__main__"})

    for block in re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for command in block.replace("\\\n", "").splitlines():
            name, *arguments = shlex.split(command)
            assert name == "parasparse"
            assert main(arguments) == 0, command


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks_are_at_most_76_columns_wide(page):
    wide, within = [], False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            within = not within
        elif within and len(line) > 76:
            wide.append(f"line {number}: {len(line)} columns")
    assert not wide


def test_readme_names_its_two_commands():
    text = PAGES[0].read_text()
    assert "make demo" in text
    assert "make test" in text


def test_internals_name_files_and_tests_that_exist():
    text = (ROOT / "docs" / "internals.md").read_text()
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    paths = re.findall(r"`((?:tests|parasparse)/[\w/]+\.py)`", text)
    paths += [f"parasparse/{path}" for path in re.findall(r"`([a-z_]+/[\w/]+\.py)`", text)
              if not path.startswith(("tests/", "parasparse/", "torch/"))]  # fmt: skip
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []
    named = re.findall(r"`?\b((?:test|ddp|fsdp2)_\w+)\b(?!\.py|/)", text)
    files = {path.stem for path in (ROOT / "tests").rglob("*.py")}
    assert [n for n in named if f"def {n}" not in sources and n not in files] == []


def test_internals_name_tests_where_they_are():
    text = (ROOT / "docs" / "internals.md").read_text()
    pairs = re.findall(r"`(\w+/\w+\.py)::(test_\w+)`", text)
    assert len(pairs) > 20
    missing = [
        f"{path}::{name}" for path, name in pairs
        if not (ROOT / "tests" / path).exists()
        or f"\ndef {name}(" not in (ROOT / "tests" / path).read_text()
    ]  # fmt: skip
    assert missing == []
