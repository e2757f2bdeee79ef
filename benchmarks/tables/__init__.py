"""Write the results of the benchmarks into the pages of the documentation that show them.

    python -m benchmarks.tables [--check]

A page contains `<!-- table: NAME -->` and `<!-- end of table -->`, each on its own line; the text
between them is written here, from benchmarks/results. NAME is `losses`, or the name of a results
file, a dot, and `machine` or a table of that file. The charts in docs/images are drawn as well.
`--check` writes nothing and names the pages and charts that do not match the results.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from benchmarks.tables import (
    charts,
    deploy_page,
    language_page,
    oneshot_page,
    payoff_page,
    performance_page,
    runtimes_page,
    training_page,
)
from benchmarks.tables.losses import losses
from benchmarks.tables.markdown import Content, machine

HERE = Path(__file__).parents[1]
PAGES = HERE.parent / "docs"
ON_PAGES = (
    performance_page, payoff_page, runtimes_page, deploy_page, training_page, language_page,
    oneshot_page,
)  # fmt: skip
TABLES = {name: function for page in ON_PAGES for name, function in page.TABLES.items()}
BEGIN, END = re.compile(r"^<!-- table: (\S+) -->$", re.MULTILINE), "<!-- end of table -->"
MARKED = re.compile(rf"({BEGIN.pattern}\n)(.*?)^({END})$", re.MULTILINE | re.DOTALL)


def results(folder: Path = HERE / "results") -> dict[str, Content]:
    """Return the content of each results file, by its name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def made(name: str, contents: dict[str, Content]) -> str:
    """Return the table with this name.

    Raises:
        KeyError: there is no such table.
    """
    if name == "losses":
        return losses(contents)
    file, _, part = name.partition(".")
    function = machine if part == "machine" else TABLES[name]
    if file not in contents:
        return f"Not measured yet: `python -m benchmarks {file}`."
    return function(contents[file])


def names_on(text: str) -> list[str]:
    """Return the names of the tables on a page.

    Raises:
        ValueError: a table has no end, or an end has no beginning.
    """
    found = [match[2] for match in MARKED.finditer(text)]
    if found != BEGIN.findall(text) or len(found) != text.count(END):
        raise ValueError(f"each `<!-- table: NAME -->` must have its `{END}`; found {found}.")
    return found


def filled(text: str, contents: dict[str, Content]) -> str:
    """Return the page with its tables written again."""
    names_on(text)
    return MARKED.sub(lambda m: f"{m[1]}\n{made(m[2], contents)}\n\n{m[4]}", text)


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    contents = results()
    changes = {**pages(contents), **images(contents, check=bool(arguments))}
    for path, new in changes.items():
        if not arguments:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(new)
        print(path.relative_to(HERE.parent), "is out of step" if arguments else "rewritten")
    return int(bool(arguments and changes))


def pages(contents: dict[str, Content]) -> dict[Path, bytes]:
    """Return the new content of each page that does not match the results."""
    found = {path: path.read_text() for path in sorted(PAGES.rglob("*.md"))}
    new = {path: filled(text, contents) for path, text in found.items()}
    return {path: text.encode() for path, text in new.items() if text != found[path]}


def images(contents: dict[str, Content], *, check: bool) -> dict[Path, bytes]:
    """Return the new content of each chart that is to be written, or none of those that match."""
    found = {}
    for name in charts.CHARTS:
        path = PAGES / "images" / f"{name}.svg"
        if check and path.exists() and charts.is_current(path, contents):
            continue
        found[path] = charts.svg(name, contents)
    return {
        path: new for path, new in found.items() if not path.exists() or path.read_bytes() != new
    }
