"""The tables of docs/performance.md, and of other pages that tell what masks cost."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks._markdown import Content, asked, flipped, grid, percent, significant, table, times

THREADS = r"(\d) thread\(s\)"
SECONDS, MICROSECONDS = 1e3, 1e-3


def weights(content: Content) -> str:
    columns = ["weights", "threads", "pass"]
    return grid(content, rf"(2\^\d+) weights, {THREADS}, (.*)", columns)


def against(content: Content) -> str:
    """Say how one weight compares with the fastest that store masks of the same type."""
    floats, bools = [], []
    for (size, number, what), ts in asked(content, rf"(2\^\d+) weights, {THREADS}, (.*)"):
        ours, ratios = ts["parasparse"]["ratio"], {name: t["ratio"] for name, t in ts.items()}
        by_float = ours / min(ratios["torch.nn.utils.prune"], ratios["torch.ao FakeSparsity"])
        bools.append(ours / min(ratios["stock where"], ratios["stock product"]))
        if number == "1":
            floats.append(f"{size} {what}: {times(by_float)}")
    return (
        "parasparse's time over that of the faster of the two that store float masks, on one "
        f"thread: {'; '.join(floats)}. Over that of the faster of the two that store bool masks: "
        f"{times(min(bools))} to {times(max(bools))}."
    )


def reading(content: Content) -> str:
    return flipped(content, r"reading one 64 x 64 weight, (\w+)", "", per=MICROSECONDS)


def networks(content: Content) -> str:
    lines: dict[str, list[str]] = {}
    for (name,), ts in asked(content, r"(.*, \d) thread\(s\), (?:evaluation|training).*"):
        ratios = [times(timing["ratio"]) for timing in list(ts.values())[1:]]
        lines.setdefault(name, []).extend(ratios)
    header = [
        "network, threads", "evaluation, batch 1: masked", "frozen", "squashed",
        "batch 8: masked", "frozen", "squashed", "training step, batch 8",
    ]  # fmt: skip
    return table(header, [[name, *line] for name, line in lines.items()])


def selection(content: Content) -> str:
    return grid(content, rf"([\d,]+) weights, {THREADS}", ["weights", "threads"])


def selection_memory(content: Content) -> str:
    sizes = content["peak_bytes_per_weight"]
    names = list(next(iter(sizes.values())))
    rows = [[size, *(significant(found[name]) for name in names)] for size, found in sizes.items()]
    return table(["bytes a weight", *names], rows)


def selection_each(content: Content) -> str:
    """Say what a weight costs at each size."""
    each = []
    for (size,), ts in asked(content, r"([\d,]+) weights, 1 thread\(s\)"):
        nanoseconds = ts["parasparse"]["median"] * 1e6 / int(size.replace(",", ""))
        each.append(f"{nanoseconds:.1f} for {size}")
    return f"Nanoseconds a weight, parasparse on one thread: {', '.join(each)}."


def scale(content: Content) -> str:
    rows = []
    for (size, number), ts in asked(content, rf"(.*), {THREADS}"):
        ours, each = (
            ts["sparsify"],
            content["nanoseconds_per_weight"][f"{size}, {number} thread(s)"],
        )
        memory = significant(content["peak_bytes_per_weight"][size]) if number == "1" else ""
        seconds, passes = significant(ours["median"] / SECONDS), significant(ours["ratio"])
        rows.append([size, number, seconds, f"{each:.1f}", passes, memory])
    header = ["weights", "threads", "seconds", "ns a weight", "passes of `abs`", "bytes a weight"]
    return table(header, rows)


def steps(content: Content) -> str:
    rows = []
    for (name, number), ts in asked(content, rf"training step, (.*), {THREADS}"):
        averages = content["amortised"][f"training step, {name}, {number} thread(s)"]
        rows.append([name, number, "no masks", times(ts["dense"]["ratio"]), "-", "-"])
        for controller, average in averages.items():
            between, update = (ts[f"{controller}, {kind}"] for kind in ("between", "update"))
            ratios = times(between["ratio"]), times(update["ratio"]), f"{average:.3f}"
            rows.append([name, number, controller, *ratios])
    header = ["training step", "threads", "", "without update", "with update", "average of 100"]
    return table(header, rows)


def dynamic_steps(content: Content) -> str:
    return flipped(content, "(.*)", "processor time, ms")


def controllers(content: Content) -> str:
    return grid(content, rf"one update of ([\d,]+) weights, {THREADS}", ["weights", "threads"])


def blocks(content: Content) -> str:
    return grid(content, r"(\w+), (\d+) blocks", ["backend", "blocks"], per=SECONDS)


def frames(content: Content) -> str:
    rows = []
    for question, found in content["frames"].items():
        backend, _, number = question.partition(", ")
        limits = content["limit_reached"][question]
        cells = [f"{found[name]}{', limit reached' if limits[name] else ''}" for name in found]
        rows.append([backend, number.removesuffix(" blocks"), *cells])
    return table(["backend", "blocks", *found], rows)


def updates(content: Content) -> str:
    columns = ["scope", "masks", "threads"]
    return grid(content, rf"ResNet-18, (\w+), (\w+), {THREADS}", columns)


def updates_ao(content: Content) -> str:
    return grid(content, rf"matrices, blocks of (.*), again, {THREADS}", ["blocks", "threads"])


def sizes(content: Content) -> str:
    found = content["bytes"]
    names = list(next(iter(found.values())))
    rows = [[name, *(megabytes(of[name], of["dense"]) for of in found.values())] for name in names]
    return table(["file, MB", *map(percent, found)], rows)


def megabytes(size: int, dense: int) -> str:
    return f"{significant(size / 1e6)} ({significant(size / dense)})"


def sizes_times(content: Content) -> str:
    return flipped(content, r"(\d+%)", "milliseconds")


def channels(content: Content) -> str:
    pattern = r"(.*), (\d+%) of channels, batch (\d+)"
    return grid(content, pattern, ["network", "channels gone", "batch"])


def channels_left(content: Content) -> str:
    rows = []
    for question, kept in content["channels_kept"].items():
        size = content["bytes"][question]
        name, _, gone = question.removesuffix(" of channels").rpartition(", ")
        shares = [f"{share:.3f}" for share in kept.values()]
        files = [megabytes(each, size["dense"]) for each in size.values()]
        rows.append([name, percent(gone), *shares, *files])
    header = [*(f"kept by {way}" for way in kept), *(f"MB, {way}" for way in size)]
    return table(["network", "channels gone", *header], rows)


def command_line(content: Content) -> str:
    return flipped(content, "(.*)", "milliseconds")


def command_line_memory(content: Content) -> str:
    rows = [[name, f"{peak:.1f}"] for name, peak in content["memory"].items()]
    return table(["command", "peak, in largest tensors"], rows)


def sharding(content: Content) -> str:
    rows = [[str(value) for value in row.values()] for row in content["rows"]]
    return table([name.replace("_", ", ") for name in content["rows"][0]], rows)


TABLES: dict[str, Callable[[Content], str]] = {
    "overhead.weights": weights,
    "overhead.against": against,
    "overhead.reading": reading,
    "overhead.networks": networks,
    "selection.times": selection,
    "selection.memory": selection_memory,
    "selection.each": selection_each,
    "scale.times": scale,
    "dynamics.steps": steps,
    "dynamics.updates": controllers,
    "steps.times": dynamic_steps,
    "blocks.seconds": blocks,
    "blocks.frames": frames,
    "updates.prune": updates,
    "updates.ao": updates_ao,
    "sizes.bytes": sizes,
    "sizes.times": sizes_times,
    "channels.times": channels,
    "channels.bytes": channels_left,
    "checkpoints.times": command_line,
    "checkpoints.memory": command_line_memory,
    "sharding.memory": sharding,
}
