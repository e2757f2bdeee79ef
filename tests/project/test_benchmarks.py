"""The tables and charts of the documentation show all results of the benchmarks, and no others."""

import copy
import json
import re
from pathlib import Path

import pytest

import benchmarks.__main__ as runner
from benchmarks import tables, timing
from benchmarks.tables import charts
from benchmarks.tables.losses import COMPARED, Compared, losses, quotients
from benchmarks.tables.markdown import machine, significant, table

ROOT = Path(__file__).parents[2]
SHARED = {"timing", "networks", "memory", "runtime_process", "fmchisel_alone"}
PAGES = sorted((ROOT / "docs").rglob("*.md"))
RESULTS = tables.results()
ON_PAGES = {name for page in PAGES for name in tables.names_on(page.read_text())}
MEASURED = sorted({name.partition(".")[0] for name in tables.TABLES} & RESULTS.keys())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_in_step_with_the_results(page):
    text = page.read_text()
    assert tables.filled(text, RESULTS) == text, "run: python -m benchmarks.tables"


@pytest.mark.parametrize("name", charts.CHARTS)
def test_a_chart_is_in_step_with_the_results(name):
    path = ROOT / "docs" / "images" / f"{name}.svg"
    assert charts.is_current(path, RESULTS), "run: python -m benchmarks.tables"
    assert not charts.is_current(path, {})


def leaves(content, path=()):
    """Yield the path of each result: a timing, or what is no dict, list or timing."""
    if isinstance(content, dict) and {"median", "ratio"} <= content.keys():
        yield path
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from leaves(value, (*path, key))
    elif isinstance(content, list):
        for i, value in enumerate(content):
            yield from leaves(value, (*path, i))
    else:
        yield path


def changed(value):
    if isinstance(value, dict):
        return {key: 7 * number for key, number in value.items()}
    if isinstance(value, str):
        return value + "x"
    return not value if isinstance(value, bool) else 7 * (value or 1)


def shown(file, content):
    return [function(content) for name, function in tables.TABLES.items() if name.startswith(file)]


@pytest.mark.parametrize("file", MEASURED)
def test_every_result_is_in_a_table(file):
    content = copy.deepcopy(RESULTS[file])
    before = shown(f"{file}.", content)
    yardsticks = {(q, next(iter(ts))) for q, ts in content.get("results", {}).items()}
    for *way, last in leaves(content):
        if way[:1] == ["machine"] or [*way, last] == ["unit"] or way[:1] == ["versions"]:
            continue
        if way[:1] == ["results"] and (way[1], last) in yardsticks:
            continue  # the others' ratios are to it
        place = content
        for key in way:
            place = place[key]
        was, place[last] = place[last], changed(place[last])
        assert shown(f"{file}.", content) != before, f"{[*way, last]} is in no table"
        place[last] = was


def test_the_tables_of_a_file_are_on_pages_all_or_none():
    files = {name.partition(".")[0] for name in ON_PAGES - {"losses"}}
    expected = {name for name in tables.TABLES if name.partition(".")[0] in files}
    assert expected | {"losses"} | {f"{file}.machine" for file in files} == ON_PAGES
    elsewhere = {"checkpoints", "sharding"}  # pages that tell of them have tables of their own
    assert {name.partition(".")[0] for name in tables.TABLES} - files <= elsewhere


@pytest.mark.parametrize("file", MEASURED)
def test_a_line_says_the_machine_the_versions_and_the_date(file):
    about = RESULTS[file]["machine"]
    line = machine(RESULTS[file])
    for part in (about["processor"], about["date"], about["python"], f"{about['cores']} cores"):
        assert part in line
    assert re.search(r"torch \d+\.\d+\.\d+,", line)


def test_what_is_slower_by_more_than_noise_is_listed():
    timing = {"dense": {"ratio": 1.0}, "masked": {"ratio": 1.5}}
    content = {"results": {"one": timing, "two": {**timing, "masked": {"ratio": 1.01}}}}
    text = losses({"overhead": content})
    assert "| networks with masks | 1.50 | dense | 1 of 2 | one |" in text
    assert len(text.splitlines()) == 3


def test_a_loss_in_bytes_is_listed():
    text = losses({"channels": {"bytes": {"all": {"Torch-Pruning": 2, "parasparse": 6}}}})
    assert "| whole channels, bytes | 3.00 | Torch-Pruning | 1 of 1 | all |" in text


@pytest.mark.parametrize("compared", COMPARED, ids=lambda c: f"{c.what} in {c.key}")
def test_what_is_compared_is_there(compared: Compared):
    if compared.file not in RESULTS:
        pytest.skip(f"{compared.file} is not measured yet")
    for peer in compared.theirs:
        assert quotients(RESULTS[compared.file], compared, peer)


def test_the_page_on_compact_training_says_where_it_is_slower():
    timings = {way: {"ratio": ratio} for way, ratio in (("dense", 1.0), ("compact", 1.5))}
    content = {"results": {"LSTM, 80%, 1 threads": timings, "MLP, 90%, 2 threads": timings}}
    content["results"]["MLP, 90%, 2 threads"] = {**timings, "compact": {"ratio": 0.5}}
    text = tables.TABLES["training.slower"](content)
    assert "Slower than dense in 1 of 2 cases, at worst 1.50 times: LSTM, 1 thread, 80%." in text
    assert "Slower than SparseLab in 0 of 0 cases." in text


def test_results_that_are_missing_are_said_to_be():
    assert tables.made("sizes.bytes", {}) == "Not measured yet: `python -m benchmarks sizes`."
    with pytest.raises(KeyError):
        tables.made("sizes.nothing", {"sizes": {}})


@pytest.mark.parametrize(
    "text",
    [
        "<!-- table: losses -->\n",
        "<!-- table: losses -->\n<!-- table: losses -->\n<!-- end of table -->\n",
        "<!-- end of table -->\n",
    ],
    ids=["no end", "within another", "no beginning"],
)
def test_a_marker_without_its_other_half_is_refused(text):
    with pytest.raises(ValueError, match="must have its"):
        tables.filled(text, RESULTS)


def test_check_says_which_page_is_out_of_step(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("a\n\n<!-- table: losses -->\n<!-- end of table -->\n\nb\n")
    monkeypatch.setattr(tables, "PAGES", tmp_path)
    monkeypatch.setattr(tables, "HERE", tmp_path / "benchmarks")
    old = page.read_text()
    assert tables.main(["--check"]) == 1
    assert "page.md is out of step" in capsys.readouterr().out
    assert page.read_text() == old
    assert tables.main([]) == 0
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [
        "payoff.svg", "performance.svg",
    ]  # fmt: skip
    assert page.read_text() != old
    assert page.read_text().startswith("a\n")
    assert page.read_text().endswith("\n\nb\n")
    assert tables.main(["--check"]) == 0
    assert tables.main(["--chek"]) == 2


def test_numbers_have_three_digits_and_columns_of_them_are_to_the_right():
    assert [significant(x) for x in (0.05857, 0.8, 1.838, 26_509.7)] == [
        "0.0586", "0.800", "1.84", "26,510",
    ]  # fmt: skip
    assert table(["a", "b", "c"], [["1", "2", "x"]]).splitlines()[1] == "| --- | ---: | --- |"


def test_the_runner_goes_on_after_a_failure_and_names_it(monkeypatch, capsys):
    ran = []

    def run(name, limit):
        ran.append(name)
        return "ended with exit code 1" if name == "selection" else None

    monkeypatch.setattr(runner, "run", run)
    monkeypatch.setattr(tables, "main", ran.append)
    assert runner.main([]) == 1
    assert ran == [*runner.LIMITS, []]  # the tables last
    assert "FAILED: selection" in capsys.readouterr().err
    assert runner.main(["overhead"]) == 0
    assert runner.main(["overheat"]) == 2


def test_the_runner_says_what_went_wrong():
    assert runner.run("there_is_none", 60) == "ended with exit code 1"
    assert runner.run("selection", 0.01) == "took more than 0 minutes"


def test_the_runner_knows_every_benchmark():
    scripts = {p.stem for p in (ROOT / "benchmarks").glob("[!_]*.py")}
    apart = {"mnist", "mnist_compact", "mnn", "runtimes", "tickets"}
    assert runner.LIMITS.keys() == scripts - SHARED - apart


def test_no_benchmark_imports_another():
    for path in (ROOT / "benchmarks").glob("[!_]*.py"):
        imported = re.findall(r"^from benchmarks\.?(\w*) import", path.read_text(), re.MULTILINE)
        assert set(imported) <= SHARED, path.name


def test_timings_are_of_interleaved_calls_and_ratios_are_paired():
    calls = []
    functions = {"one": lambda: calls.append(1) or 2.0, "two": lambda: calls.append(2) or 3.0}
    found = timing.compare(functions, repeats=4, warm_up=0, clock=timing.own)
    rounds = list(zip(calls[::2], calls[1::2], strict=True))
    assert set(rounds) == {(1, 2), (2, 1)}  # each function once, in either order
    assert (found["one"].ratio, found["two"].ratio, found["two"].median) == (1.0, 1.5, 3.0)


def test_what_is_prepared_is_not_timed():
    prepared = []
    call = timing.after(lambda: prepared.append(1) or "x", lambda it: prepared.append(it))
    assert call() >= 0
    assert prepared == [1, "x"]


def test_results_are_json_with_their_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    monkeypatch.setattr(timing, "HERE", tmp_path / "benchmarks")
    timing.write("some", {"q": {"a": timing.Timing(1, 1, 1, 1)}}, more=[1])
    content = json.loads((tmp_path / "some.json").read_text())
    assert content["machine"]["torch"]
    assert content["more"] == [1]
    assert content["results"]["q"]["a"]["ratio"] == 1
