"""The tables of docs/performance.md, and of other pages about the cost of masks."""

from __future__ import annotations

from benchmarks.tables.markdown import (
    Content,
    Table,
    asked,
    flipped,
    grid,
    short,
    significant,
    table,
    time_in,
    times,
)

THREADS = r"(\d thread\(s\))"


def weights(content: Content) -> str:
    return grid(content, rf"(2\^\d+) weights, {THREADS}, (.*)", "weights, threads, pass")


def against(content: Content) -> str:
    """Compare one weight with the faster of the tools that store masks of the same type."""
    floats, bools = [], []
    for (size, number, what), ts in asked(content, rf"(2\^\d+) weights, {THREADS}, (.*)"):
        ours, ratios = ts["parasparse"]["ratio"], {name: t["ratio"] for name, t in ts.items()}
        by_float = ours / min(ratios["torch.nn.utils.prune"], ratios["torch.ao FakeSparsity"])
        bools.append(ours / min(ratios["stock where"], ratios["stock product"]))
        if number == "1 thread":
            floats.append(f"{times(by_float)} ({size}, {what})")
    return (
        "Time of parasparse relative to the faster of the two tools with float masks, on one "
        f"thread: {', '.join(floats)}. Relative to the faster of the two with bool masks: "
        f"{times(min(bools))} to {times(max(bools))}."
    )


def reading(content: Content) -> str:
    return flipped(content, r"reading one 64 x 64 weight, (\w+)", "read with", unit="us")


def networks(content: Content) -> str:
    lines: dict[str, list[str]] = {}
    pattern = r"(.*, \d thread\(s\)), (?:evaluation|training).*"
    for (name,), ts in asked(content, pattern):
        ratios = [times(timing["ratio"]) for timing in list(ts.values())[1:]]
        lines.setdefault(name, []).extend(ratios)
    header = [
        "network, threads", "evaluation, batch 1: masked", "frozen", "squashed",
        "batch 8: masked", "frozen", "squashed", "training step, batch 8",
    ]  # fmt: skip
    return table(header, [[name, *line] for name, line in lines.items()])


def selection(content: Content) -> str:
    return grid(content, rf"([\d,]+) weights, {THREADS}", "weights, threads")


def selection_memory(content: Content) -> str:
    sizes = content["peak_bytes_per_weight"]
    names = list(next(iter(sizes.values())))
    rows = [[size, *(significant(found[name]) for name in names)] for size, found in sizes.items()]
    return table(["bytes per weight", *names], rows)


def selection_each(content: Content) -> str:
    """Return the time per weight at each size."""
    each = []
    for (size,), ts in asked(content, r"([\d,]+) weights, 1 thread\(s\)"):
        nanoseconds = ts["parasparse"]["median"] * 1e6 / int(size.replace(",", ""))
        each.append(f"{nanoseconds:.1f} for {size}")
    return f"Nanoseconds per weight, parasparse on one thread: {', '.join(each)}."


def scale(content: Content) -> str:
    rows = []
    for (size, number), ts in asked(content, rf"(.*), {THREADS}"):
        count = number.partition(" ")[0]
        each = content["nanoseconds_per_weight"][f"{size}, {count} thread(s)"]
        memory = significant(content["peak_bytes_per_weight"][size]) if count == "1" else "-"
        ours = ts["sparsify"]
        passes = significant(ours["ratio"])
        rows.append([f"{size}, {number}", passes, time_in(ours, "s"), f"{each:.1f}", memory])
    header = ["weights, threads", "passes of `abs`", "seconds", "ns per weight"]
    return table([*header, "bytes per weight"], rows)


def steps(content: Content) -> str:
    rows = []
    for (name, number), ts in asked(content, rf"training step, (.*), {THREADS}"):
        count = number.partition(" ")[0]
        averages = content["amortised"][f"training step, {name}, {count} thread(s)"]
        about = f"{name.partition(', batch')[0]}, {number}"
        rows.append([f"{about}, no masks", "-", times(ts["dense"]["ratio"]), "-"])
        for controller, average in averages.items():
            between, update = (ts[f"{controller}, {kind}"] for kind in ("between", "update"))
            ratios = f"{average:.3f}", times(between["ratio"]), times(update["ratio"])
            rows.append([f"{about}, {controller}", *ratios])
    header = ["training step", "average of 100 steps", "step without update"]
    return table([*header, "step with update"], rows)


def dynamic_steps(content: Content) -> str:
    return flipped(content, "(.*)", "training with")


def controllers(content: Content) -> str:
    return grid(content, rf"one update of ([\d,]+) weights, {THREADS}", "weights, threads")


def blocks(content: Content) -> str:
    return grid(content, r"(\w+), (\d+ blocks)", "backend, blocks", unit="s")


def frames(content: Content) -> str:
    rows, names = [], []
    for question, found in content["frames"].items():
        limits = content["limit_reached"][question]
        names = sorted(found, key=lambda name: name != "parasparse")
        cells = [f"{found[name]}{', limit reached' if limits[name] else ''}" for name in names]
        rows.append([question, *cells])
    return table(["backend, blocks", *map(short, names)], rows)


def updates(content: Content) -> str:
    return grid(content, rf"ResNet-18, (\w+), (\w+), {THREADS}", "scope, masks, threads")


def updates_ao(content: Content) -> str:
    return grid(content, rf"matrices, blocks of (.*), again, {THREADS}", "blocks, threads")


def sizes(content: Content) -> str:
    found = content["bytes"]
    names = list(next(iter(found.values())))
    rows = [[name, *(share(of[name], of["dense"]) for of in found.values())] for name in names]
    return table(["file", *found], rows)


def share(size: int, dense: int) -> str:
    """Return the share of the dense file, and megabytes."""
    return f"{significant(size / dense)} ({significant(size / 1e6)})"


def sizes_times(content: Content) -> str:
    return flipped(content, r"(\d+%)", "file")


def channels(content: Content) -> str:
    pattern = r"(.*), (\d+%) of channels, (batch \d+)"
    return grid(content, pattern, "network, channels removed, batch")


def channels_left(content: Content) -> str:
    rows, every = [], content["channels_kept"].values()
    ways = sorted(dict.fromkeys(w for kept in every for w in kept), key=lambda w: w != "parasparse")
    for question, kept in content["channels_kept"].items():
        shares = [f"{kept[way]:.3f}" if way in kept else "-" for way in ways]
        rows.append([question.removesuffix(" of channels"), *shares])
    header = ["network, channels removed", *(f"channels kept by {way}" for way in ways)]
    kept_table = table(header, rows)
    return f"{_of_dense(content['bytes'], 'MB')}\n\n{kept_table}"


def channels_memory(content: Content) -> str:
    return _of_dense(content["memory"], "MB") if "memory" in content else TO_COME


def channels_planning(content: Content) -> str:
    if "planning" not in content:
        return TO_COME
    return grid({"results": content["planning"]}, "(.*)", "network")


def channels_large(content: Content) -> str:
    if not content.get("large"):
        return TO_COME
    rows = [
        [
            name, f"{found['weights'] / 1e9:.1f}", f"{found['seconds']:.0f}",
            f"{found['processor_seconds']:.0f}", f"{found['peak_bytes'] / 1e9:.1f}",
        ]
        for name, found in content["large"].items()
    ]  # fmt: skip
    header = ["model", "weights, billions", "seconds", "of the processor", "peak, GB"]
    return table(header, rows)


TO_COME = "Not measured yet: `python -m benchmarks channels`."


def _of_dense(found: dict[str, dict[str, int]], unit: str) -> str:
    """Return a table of bytes: shares of the dense network, and megabytes."""
    names = dict.fromkeys(way for ways in found.values() for way in ways if way != "dense")
    ways = sorted(names, key=lambda way: way != "parasparse")
    rows = [
        [
            question.removesuffix(" of channels"),
            *(share(sizes[way], sizes["dense"]) if way in sizes else "-" for way in ways),
            significant(sizes["dense"] / 1e6),
        ]
        for question, sizes in found.items()
    ]
    return table(["network, channels removed", *ways, f"dense, {unit}"], rows)


def command_line(content: Content) -> str:
    return flipped(content, "(.*)", "command")


def command_line_memory(content: Content) -> str:
    rows = [[name, f"{peak:.1f}"] for name, peak in content["memory"].items()]
    return table(["command", "peak, in largest tensors"], rows)


def sharding(content: Content) -> str:
    rows = [[str(value) for value in row.values()] for row in content["rows"]]
    return table([name.replace("_", ", ") for name in content["rows"][0]], rows)


TABLES: dict[str, Table] = {
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
    "channels.memory": channels_memory,
    "channels.planning": channels_planning,
    "channels.large": channels_large,
    "checkpoints.times": command_line,
    "checkpoints.memory": command_line_memory,
    "sharding.memory": sharding,
}
