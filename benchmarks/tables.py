"""Put the results of benchmarks into the pages of the documentation that show them.

    python -m benchmarks.tables [--check]

A page holds `<!-- table: NAME -->` and `<!-- end of table -->`, each on a line by itself; what lies
between is written here, from benchmarks/results. NAME is the name of a results file, a dot, and
`machine` or a table of that file; or `losses`. `--check` writes nothing and says which pages are
out of step with the results.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from benchmarks import _payoff, _performance
from benchmarks._losses import losses
from benchmarks._markdown import Content, machine

HERE = Path(__file__).parent
PAGES = HERE.parent / "docs"
TABLES = {**_performance.TABLES, **_payoff.TABLES}
BEGIN, END = re.compile(r"^<!-- table: (\S+) -->$", re.MULTILINE), "<!-- end of table -->"
MARKED = re.compile(rf"({BEGIN.pattern}\n)(.*?)^({END})$", re.MULTILINE | re.DOTALL)


def results(folder: Path = HERE / "results") -> dict[str, Content]:
    """Return what each results file holds."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def made(name: str, contents: dict[str, Content]) -> str:
    """Return the table that `name` stands for.

    Raises:
        KeyError: there is none of that name.
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
        ValueError: a table does not end, or an end has no beginning.
    """
    found = [match[2] for match in MARKED.finditer(text)]
    if found != BEGIN.findall(text) or len(found) != text.count(END):
        raise ValueError(f"each `<!-- table: NAME -->` must have its `{END}`; found {found}.")
    return found


def filled(text: str, contents: dict[str, Content]) -> str:
    """Return the page with its tables made anew."""
    names_on(text)
    return MARKED.sub(lambda m: f"{m[1]}\n{made(m[2], contents)}\n\n{m[4]}", text)


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    contents = results()
    out_of_step = 0
    for path in sorted(PAGES.rglob("*.md")):
        text = path.read_text()
        new = filled(text, contents)
        if new == text:
            continue
        out_of_step += 1
        if not arguments:
            path.write_text(new)
        print(path.relative_to(HERE.parent), "is out of step" if arguments else "rewritten")
    return int(bool(arguments and out_of_step))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
