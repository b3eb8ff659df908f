"""One picture per sub-command, readable at the width of a README."""

from __future__ import annotations

from typing import Any

from torch_flash_mla.bench.report import machine_line

Row = dict[str, Any]

# Dark to light: more heads, more threads, another form. Legible in print and without colours.
SHADES = ("#0b3c5d", "#328cc1", "#9ad0ec", "#d9b310", "#c8553d", "#6b705c", "#b7b7a4", "#333333")
ROOF, TORCH = "#c8553d", "#333333"


def _distinct(rows: list[Row], *keys: str) -> list[Any]:
    """The values of a key (tuples of several), each once, in order of appearance."""
    found = dict.fromkeys(tuple(row.get(key) for key in keys) for row in rows)
    return [values[0] if len(keys) == 1 else values for values in found]


def _matching(rows: list[Row], **values: Any) -> list[Row]:
    return [row for row in rows if all(row.get(key) == value for key, value in values.items())]


def _grouped_bars(ax: Any, rows: list[Row], group: str, member: str, value: str, unit: str) -> None:
    """Groups of bars, with the roof and torch's rate over each bar, where rows know them."""
    groups, members = _distinct(rows, group), _distinct(rows, member)
    width = 0.8 / len(members)
    tallest = max(max(row.get(value, 0), row.get("roof_gflops", 0)) for row in rows)
    for m, name in enumerate(members):
        shade = SHADES[m % len(SHADES)]
        label = f"{name} {unit}".strip()
        for g, group_name in enumerate(groups):
            found = _matching(rows, **{group: group_name, member: name})
            if not found or value not in found[0]:
                continue
            row, x = found[0], g + (m - (len(members) - 1) / 2) * width
            ax.bar(x, row[value], width * 0.92, color=shade, label=label)
            label = "_"
            left, right = x - width * 0.46, x + width * 0.46
            if "roof_gflops" in row:
                ax.hlines(row["roof_gflops"], left, right, color=ROOF, lw=2, zorder=3)
            if "torch_gflops" in row:
                ax.plot(x, row["torch_gflops"], "D", ms=4, color=TORCH, mec="white", zorder=4)
            if "share" in row:
                inside = row[value] > 0.2 * tallest
                ax.annotate(
                    f"{row['share']:.0%}", (x, row[value]), (0, -3 if inside else 3),
                    textcoords="offset points", ha="center", va="top" if inside else "bottom",
                    rotation=90, fontsize=8, color="white" if inside and m < 2 else "black",
                )  # fmt: skip
    ax.set_xticks(range(len(groups)), [str(g) for g in groups])


def _marks(ax: Any, rows: list[Row]) -> None:
    """Legend entries of the marks that bars carry."""
    if any("roof_gflops" in row for row in rows):
        ax.plot([], [], "-", color=ROOF, lw=2, label="instruction roof")
    if any("torch_gflops" in row for row in rows):
        ax.plot([], [], "D", color=TORCH, ms=4, ls="", label="torch SDPA, dense cache")


def _roof(figure: Any, rows: list[Row]) -> None:
    ax, memory = figure.subplots(1, 2, width_ratios=[5, 1])
    _grouped_bars(ax, [r for r in rows if "gflops" in r], "isa", "arithmetic", "gflops", "")
    ax.set_ylabel("GFLOP/s")
    ax.set_title("dot products on registers", fontsize=10)
    ax.legend(fontsize=8)
    for row in rows:
        if "gbs" in row:
            memory.bar(0, row["gbs"], 0.5, color=SHADES[0])
    memory.set_xlim(-0.7, 0.7)
    memory.set_xticks([0], ["read"])
    memory.set_ylabel("GB/s")
    memory.set_title("memory", fontsize=10)


def _decode(figure: Any, rows: list[Row]) -> None:
    panels = _distinct(rows, "isa", "n_kv", "queries")
    columns = min(3, len(panels))
    axes = figure.subplots(-(-len(panels) // columns), columns, squeeze=False, sharey="row").flat
    for ax, (isa, n_kv, queries) in zip(axes, panels, strict=False):
        part = _matching(rows, isa=isa, n_kv=n_kv, queries=queries)
        _grouped_bars(ax, part, "format", "heads", "gflops", "heads")
        query = f", {queries} queries" if queries > 1 else ""
        ax.set_title(f"{isa}, {n_kv} keys{query}", fontsize=10)
        ax.tick_params(axis="x", labelsize=8)
    for ax in list(axes)[len(panels) :]:
        ax.set_visible(False)
    first = figure.axes[0]
    first.set_ylabel("GFLOP/s (in bars: % of roof)")
    _marks(first, rows)
    handles = first.get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper right", ncols=8, fontsize=8, frameon=False)


def _step(figure: Any, rows: list[Row]) -> None:
    """Where the time of a step goes: attention, reading the weight, the rest."""
    panels = _distinct(rows, "isa", "heads")
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True).flat
    parts = {"attention alone": SHADES[0], "weight, plain read": SHADES[1], "the rest": SHADES[3]}
    for ax, (isa, heads) in zip(axes, panels, strict=True):
        part = _matching(rows, isa=isa, heads=heads)
        shapes, formats = _distinct(part, "batch", "n_kv"), _distinct(part, "format")
        width = 0.84 / len(formats)
        for row in part:
            group = shapes.index((row["batch"], row["n_kv"]))
            x = group + (formats.index(row["format"]) - (len(formats) - 1) / 2) * width
            floor = row["attention"] + row["weight"]
            pieces = (row["attention"], row["weight"], max(0.0, row["seconds"] - floor))
            bottom = 0.0
            for seconds, shade in zip(pieces, parts.values(), strict=True):
                share = seconds / max(row["seconds"], floor)
                ax.bar(x, share, width * 0.92, bottom=bottom, color=shade)
                bottom += share
            label = f"{row['format']}  {1e3 * row['seconds']:.3g} ms"
            ax.annotate(
                label, (x, 0), (0, 4), textcoords="offset points", ha="center", va="bottom",
                rotation=90, fontsize=7, color="white",
            )  # fmt: skip
            ax.annotate(
                f"{row['floor_share']:.0%}", (x, 1), (0, 2), textcoords="offset points",
                ha="center", va="bottom", fontsize=7,
            )  # fmt: skip
        ax.set_xticks(range(len(shapes)), [f"{b} x {n} keys" for b, n in shapes])
        ax.set_ylim(0, 1.12)
        ax.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"])
        ax.set_title(f"{heads} heads, {isa}; above the bars: share of the floor", fontsize=10)
    for name, shade in parts.items():
        axes[0].bar(0, 0, color=shade, label=name)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper right", ncols=3, fontsize=8, frameon=False)


def _prefill(figure: Any, rows: list[Row]) -> None:
    panels = _distinct(rows, "format", "heads", "history")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True).flat
    names = {"torch_gflops": "torch SDPA", "torch_padded_gflops": "torch SDPA, values padded"}
    for ax, (format_name, heads, history) in zip(axes, panels, strict=True):
        part = _matching(rows, format=format_name, heads=heads, history=history)
        lengths = _distinct(part, "tokens")
        for i, (isa, form) in enumerate(_distinct(part, "isa", "form")):
            line = _matching(part, isa=isa, form=form)
            label = f"{isa}, {form}"
            x, y = [r["tokens"] for r in line], [r["gflops"] for r in line]
            ax.plot(x, y, "o-", color=SHADES[i % len(SHADES)], label=label)
            if i == 0:
                for style, (key, name) in zip(("--", ":"), names.items(), strict=True):
                    known = [r for r in line if key in r]
                    y = [r[key] for r in known]
                    x = [r["tokens"] for r in known]
                    ax.plot(x, y, "D" + style, color=TORCH, ms=4, label=name)
        ax.set_xscale("log", base=2)
        ax.set_xticks(lengths, [str(n) for n in lengths])
        ax.set_xlabel("new tokens")
        ax.set_ylim(0)
        after = f", after {history}" if history else ""
        ax.set_title(f"{format_name}, {heads} heads{after}", fontsize=10)
    figure.axes[0].set_ylabel("useful GFLOP/s")
    figure.axes[0].legend(fontsize=8)


def _append(figure: Any, rows: list[Row]) -> None:
    panels = _distinct(rows, "isa")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True).flat
    for ax, isa in zip(axes, panels, strict=True):
        part = [{**r, "us": r["seconds_per_token"] * 1e6} for r in _matching(rows, isa=isa)]
        _grouped_bars(ax, part, "format", "tokens", "us", "token(s) at once")
        ax.set_yscale("log")
        ax.set_title(isa, fontsize=10)
    figure.axes[0].set_ylabel("us per token")
    figure.axes[0].legend(fontsize=8)


def _threads(figure: Any, rows: list[Row]) -> None:
    ax = figure.subplots()
    counts = _distinct(rows, "threads")
    ax.plot(counts, counts, ":", color=ROOF, label="ideal")
    lines = _distinct(rows, "sequences", "format", "heads", "isa")
    for i, (sequences, format_name, heads, isa) in enumerate(lines):
        line = _matching(rows, sequences=sequences, format=format_name, heads=heads, isa=isa)
        x, y = [r["threads"] for r in line], [r["times_one"] for r in line]
        label = f"{sequences}, {format_name}, {heads} heads, {isa}"
        style = "o-" if i < len(SHADES) else "s--"
        ax.plot(x, y, style, color=SHADES[i % len(SHADES)], label=label, ms=5)
    ax.set_xticks(counts)
    ax.set_xlabel("threads")
    ax.set_ylim(0)
    ax.set_ylabel("speed beside one thread")
    ax.legend(fontsize=8)


_PICTURES = {
    "roof": _roof,
    "decode": _decode,
    "step": _step,
    "prefill": _prefill,
    "append": _append,
    "threads": _threads,
}


def write_plot(path: str, command: str, title: str, where: dict[str, Any], rows: list[Row]) -> None:
    """Draws the rows of a sub-command into a file (format by its ending)."""
    # matplotlib without pyplot: no display, no global state, and slow to import only when asked.
    from matplotlib.figure import Figure

    tall = 1
    if command == "decode":
        tall = -(-len(_distinct(rows, "isa", "n_kv", "queries")) // 3)
    elif command == "step":
        tall = len(_distinct(rows, "isa", "heads"))
    figure = Figure(figsize=(9, 1 + 3.4 * tall), dpi=150, layout="constrained")
    figure.suptitle(title[:1].upper() + title[1:], fontsize=11, x=0.01, ha="left")
    _PICTURES[command](figure, rows)
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.3)
        ax.set_axisbelow(True)
    figure.supxlabel(machine_line(where), fontsize=6.5, color="0.4")
    figure.savefig(path)
