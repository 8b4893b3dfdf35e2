"""The figures of a report, to be read on a light and on a dark page."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from headstart.eval.statistics import CONTEXTS, NO_HEAD, OWN_LENGTH, POSITIONS, merit

Result = dict[str, Any]  # one of the report's
INK = "#777679"  # text and axes: a page puts the color of its own text in its place
# Okabe and Ito's colors, those darkened that are too light for white paper: on white and on a
# dark page each has a contrast of 3 or more.
COLORS = {
    "transformers": "#0072B2",
    "exact": "#D55E00",
    "heuristic": "#3A95CC",
    "cost": "#009E73",
    "hybrid": "#CC79A7",
    "lookup": "#B87A00",
    "draft-model": "#8C6BB8",
    "unconstrained": "#948A00",
}
PARTS = {
    "prefill": "#948A00",
    "drafting": "#D55E00",
    "verifying, or plain steps": "#0072B2",
    "drafting and verifying, not told apart": "#8C6BB8",
}
MARKERS = ["o", "s", "D", "^", "v", "P"]
LINES = ["-", "--", "-.", ":"]
VARIANT = ("decoder", "head", "num_assistant_tokens")
HOLLOW: dict[str, Any] = {"linestyle": ":", "markerfacecolor": "none"}  # what was predicted
SHOWN = 8  # variants at most where each has a color or a panel
WIDTH = 9.0  # inches
STYLE: dict[str, Any] = {
    "font.size": 9,
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],  # equally wide: layouts hold
    "text.parse_math": False,  # names hold any character
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "grid.alpha": 0.2,
    "legend.frameon": False,
    "svg.fonttype": "none",
    **dict.fromkeys(
        ["text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"], INK
    ),
    "grid.color": INK,
}


def figures(content: dict[str, Any], temperature: float | None = None) -> dict[str, Figure]:
    """Name -> figure, of the results of one temperature (None: that of the first); without those
    for which the report has nothing."""
    if temperature is None:
        temperature = content["results"][0]["temperature"]
    results = [r for r in content["results"] if r["temperature"] == temperature]
    whole = [r for r in results if r["category"] == "all" and r["looping_texts"] == "with"]
    timed = all(r["speedup"] is not None for r in whole)
    with style.context(["default", STYLE]):
        drawn = {
            "speedup": speedup(whole, content["noise"]) if timed else None,
            "acceptance": acceptance(whole),
            "categories": categories(results) if timed else None,
            "accepted": accepted(whole),
            "time": time(whole) if timed else None,
            "positions": _lengths(whole, "by_position", POSITIONS, "new tokens before the round"),
            "contexts": _lengths(
                whole, "by_context", CONTEXTS, "tokens of prompt and text before the round"
            ),
            "spans": spans(whole),
        }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def speedup(whole: Sequence[Result], noise: dict[str, Any] | None) -> Figure:
    """Speedup against K, and of those that choose K themselves, with what was predicted."""
    heads = _names(r["head"] for r in whole if r["decoder"] not in NO_HEAD) or [None]
    fixed = sorted({_k(r) for r in whole if r["decoder"] not in OWN_LENGTH})
    ticks = [f"K = {k}" for k in fixed]
    ticks += _names(r["decoder"] for r in whole if r["decoder"] in OWN_LENGTH)
    figure = Figure(figsize=(WIDTH, 0.9 + 3 * len(heads)), layout="constrained")
    panels = figure.subplots(len(heads), 1, squeeze=False, sharey=True)[:, 0]
    for axes, head in zip(panels, heads, strict=True):
        own = [r for r in whole if r["head"] == head or r["decoder"] in NO_HEAD]
        _speedup_panel(axes, own, ticks)
        axes.axhline(1, color=INK, linewidth=1, label="plain decoding")
        if noise is not None:
            axes.axhspan(
                *noise["speedup_interval"], color=INK, alpha=0.2, label="plain against itself (95%)"
            )
        if 0 < len(fixed) < len(ticks):
            axes.axvline(len(fixed) - 0.5, color=INK, linewidth=0.8, alpha=0.5)
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set(xlim=(-0.5, len(ticks) - 0.5), ylabel="speedup (95%)")
        if len(heads) > 1:
            axes.set_title(_short(head), loc="left")
    handles = panels[0].get_legend_handles_labels()[0]
    if any(r["predicted_decode_speedup"] is not None for r in whole):
        told = Line2D([], [], color=INK, marker="o", label="predicted, without prefill", **HOLLOW)
        handles.append(told)
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def _speedup_panel(axes: Axes, results: Sequence[Result], ticks: Sequence[str]) -> None:
    series: dict[tuple[str, str | None], list[Result]] = {}
    for r in sorted(results, key=_k):
        series.setdefault((r["decoder"], r["head"]), []).append(r)
    fixed = [variant for variant in series if variant[0] not in OWN_LENGTH]
    for (decoder, head), found in series.items():
        own = decoder in OWN_LENGTH
        dodge = 0 if own else 0.1 * (fixed.index((decoder, head)) - (len(fixed) - 1) / 2)
        x = [ticks.index(decoder if own else f"K = {_k(r)}") + dodge for r in found]
        name = f"{decoder} ({_short(head)})" if decoder == "draft-model" and head else decoder
        models = [other for of, other in series if of == decoder]
        marker = MARKERS[models.index(head) % len(MARKERS)]
        look: dict[str, Any] = {"marker": marker, "color": COLORS[decoder]}
        axes.plot(x, [r["speedup"] for r in found], label=name, **look)
        intervals = [r["speedup_interval"] for r in found]
        axes.vlines(x, *zip(*intervals, strict=True), color=COLORS[decoder])
        told = [(p, r["predicted_decode_speedup"]) for p, r in zip(x, found, strict=True)]
        told = [(p + 0.04, predicted) for p, predicted in told if predicted is not None]
        if told:
            axes.plot(*zip(*told, strict=True), **HOLLOW, **look)


def acceptance(whole: Sequence[Result]) -> Figure | None:
    """a_k over k: a panel for each head with each decoder, those that choose K in one."""
    panels: dict[tuple[str, str | None], list[Result]] = {}
    for r in whole:
        if any(r["reached"]):
            name = "chooses K itself" if r["decoder"] in OWN_LENGTH else r["decoder"]
            panels.setdefault((name, r["head"]), []).append(r)
    if not panels:
        return None
    several = len({head for _, head in panels} - {None}) > 1
    figure, grid = _grid(len(panels), columns=3, height=2.6)
    top = 1.05 + 0.13 * -(-max(map(len, panels.values())) // 2)  # room for the legends
    for axes, ((name, head), found) in zip(grid, panels.items(), strict=True):
        for i, r in enumerate(found):
            own, color = r["decoder"] in OWN_LENGTH, COLORS[r["decoder"]]
            ks = [k for k, reached in enumerate(r["reached"]) if reached]
            x = [k + 1 + 0.12 * (i - (len(found) - 1) / 2) for k in ks]
            axes.plot(
                x, [r["conditional_acceptance_rate"][k] for k in ks], LINES[i % len(LINES)],
                marker=MARKERS[i % len(MARKERS)], markersize=4, linewidth=1, color=color,
                label=r["decoder"] if own else f"K = {_k(r)}",
            )  # fmt: skip
            intervals = [r["conditional_acceptance_rate_interval"][k] for k in ks]
            axes.vlines(x, *zip(*intervals, strict=True), color=color, linewidth=1)
        title = f"{name}\n{_short(head)}" if several and head is not None else name
        axes.set(title=title, xlabel="draft k", ylim=(-0.03, top))
        longest = max(len(r["reached"]) for r in found)
        axes.set(xticks=range(1, longest + 1), xlim=(0.5, longest + 0.5), yticks=[0, 0.5, 1])
        axes.legend(fontsize=8, loc="upper center", ncols=2)
    figure.supylabel("a_k (95%)", fontsize=9)
    return figure


def categories(results: Sequence[Result]) -> Figure | None:
    """Speedup and acceptance length by category, of the best K of each decoder and head."""
    rows = [r for r in results if r["looping_texts"] == "with" or r["category"] == "all"]
    names = _names(map(group_name, rows))
    if len(names) < 2:
        return None
    variants = _best([r for r in rows if group_name(r) == "all"])
    height = 1 + 0.25 * -(-len(variants) // 3) + len(names) * (0.12 + 0.11 * len(variants))
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for i, (variant, look) in enumerate(zip(variants, _looks(variants), strict=True)):
        found = [r for r in rows if all(r[key] == variant[key] for key in VARIANT)]
        dodge = 0.8 * (i - (len(variants) - 1) / 2) / len(variants)
        y = [names.index(group_name(r)) + dodge for r in found]
        for axes, key in zip(panels, ("speedup", "acceptance_length"), strict=True):
            axes.plot([r[key] for r in found], y, linestyle="", markersize=5, **look)
            intervals = [r[f"{key}_interval"] for r in found]
            axes.hlines(y, *zip(*intervals, strict=True), color=look["color"])
    panels[0].axvline(1, color=INK, linewidth=1)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set(xlabel="speedup (95%)", ylim=(len(names) - 0.5, -0.5))
    panels[1].set(xlabel="acceptance length (95%)")
    for axes in panels:
        axes.grid(visible=False, axis="y")
        for edge in range(1, len(names)):
            axes.axhline(edge - 0.5, color=INK, linewidth=0.8, alpha=0.25)
    handles = panels[0].get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def accepted(whole: Sequence[Result]) -> Figure | None:
    """Share of the rounds that accepted 0 .. K drafts, for the best K of each decoder and head."""
    variants = [r for r in _best(whole) if r["rounds"]]
    if not variants:
        return None
    figure, grid = _grid(len(variants), columns=4, height=1.9)
    for axes, variant, look in zip(grid, variants, _looks(variants), strict=True):
        counts = variant["accepted_histogram"]
        shares = [n / variant["rounds"] for n in counts]
        axes.bar(range(len(counts)), shares, color=look["color"])
        axes.set(title=look["label"].replace(" (", "\n("), xticks=range(len(counts)))
        axes.grid(visible=False, axis="x")
    figure.supxlabel("accepted drafts of a round", fontsize=9)
    figure.supylabel("share of the rounds", fontsize=9)
    return figure


def time(whole: Sequence[Result]) -> Figure:
    """Milliseconds a token, by what they were spent on, of each variant and of plain decoding."""
    first = whole[0]
    tokens = first["baseline_target_forwards"]  # one forward a token
    prefill = first["baseline_time_to_first_token"] * first["texts"] / tokens
    steps = 1 / first["baseline_tokens_per_second"] - prefill
    rows = [("plain decoding", [prefill, 0.0, steps, 0.0])]
    for look, r in zip(_looks(whole), whole, strict=True):
        seconds, share = 1 / r["tokens_per_second"], r["drafting_share"]
        prefill = r["time_to_first_token"] * r["texts"] / r["new_tokens"]
        rest, drafting = seconds - prefill, (share or 0.0) * seconds
        told = [0.0, 0.0, rest] if share is None else [drafting, rest - drafting, 0.0]
        rows.append((look["label"], [prefill, *told]))
    figure = Figure(figsize=(WIDTH, 1.1 + 0.24 * len(rows)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(rows)
    for part, (name, color) in enumerate(PARTS.items()):
        widths = [1000 * parts[part] for _, parts in rows]
        if any(widths):
            axes.barh(range(len(rows)), widths, left=left, height=0.7, color=color, label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for y, total in enumerate(left):
        place = (total, y)
        axes.annotate(f"{total:.1f}", place, (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlim=(0, 1.08 * max(left)))
    axes.set_xlabel("milliseconds a token")
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def _lengths(
    whole: Sequence[Result], groups: str, bounds: Sequence[int], what: str
) -> Figure | None:
    """Acceptance length of the rounds of each of the results' `groups`, which begin at some of
    `bounds`: after so many tokens, `what` says of which."""
    variants = [r for r in _best(whole) if groups in r]  # reports of before lack some
    edges = sorted({group["from"] for r in variants for group in r[groups]})
    if len(edges) < 2:
        return None
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    for variant, look in zip(variants, _looks(variants), strict=True):
        x = [edges.index(group["from"]) for group in variant[groups]]
        lengths = [group["acceptance_length"] for group in variant[groups]]
        axes.plot(x, lengths, markersize=5, **look)
        intervals = [group.get("acceptance_length_interval") for group in variant[groups]]
        if intervals and all(intervals):  # reports of before have none
            axes.vlines(x, *zip(*intervals, strict=True), color=look["color"], linewidth=1)
    ends = dict(pairwise(bounds))
    names = [f"{edge} to {ends[edge] - 1}" if edge in ends else f"from {edge}" for edge in edges]
    axes.set_xticks(range(len(edges)), names)
    axes.set(xlabel=what, ylabel="acceptance length")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def spans(whole: Sequence[Result]) -> Figure | None:
    """Acceptance length of the rounds that begin in thoughts, code, JSON, tool calls and prose."""
    variants = [r for r in _best(whole) if "by_span" in r]  # reports of before lack it
    names = _names(s["span"] for r in variants for s in r["by_span"] if s["rounds"])
    if len(names) < 2:
        return None
    height = 1 + 0.25 * -(-len(variants) // 3) + len(names) * (0.12 + 0.11 * len(variants))
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    for i, (variant, look) in enumerate(zip(variants, _looks(variants), strict=True)):
        found = [s for s in variant["by_span"] if s["rounds"]]
        dodge = 0.8 * (i - (len(variants) - 1) / 2) / len(variants)
        y = [names.index(s["span"]) + dodge for s in found]
        lengths = [s["acceptance_length"] for s in found]
        axes.plot(lengths, y, linestyle="", markersize=5, **look)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="acceptance length", ylim=(len(names) - 0.5, -0.5))
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _grid(panels: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """Panels in rows, with one y axis."""
    rows = -(-panels // columns)
    figure = Figure(figsize=(WIDTH, 0.3 + height * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axes in grid[panels:]:
        axes.remove()
    return figure, grid[:panels]


def _k(result: Result) -> int:
    return int(result["num_assistant_tokens"])


def group_name(result: Result) -> str:
    """The category, and whether texts that loop are left out."""
    return result["category"] + ("" if result["looping_texts"] == "with" else ", no loops")


def _best(whole: Sequence[Result]) -> list[Result]:
    """The quickest K of each decoder and head; of many the quickest, in the report's order."""
    best: dict[tuple[str, str | None], Result] = {}
    for r in sorted(whole, key=merit, reverse=True):
        best.setdefault((r["decoder"], r["head"]), r)
    shown = list(best.values())[:SHOWN]
    return [r for r in whole if r in shown]


def _looks(variants: Sequence[Result]) -> list[dict[str, Any]]:
    """How each is drawn: colors tell decoders apart, markers heads."""
    heads = _names(r["head"] for r in variants)
    several = len(set(heads) - {None}) > 1
    looks = []
    for r in variants:
        label = r["decoder"] if r["decoder"] in OWN_LENGTH else f"{r['decoder']}, K = {_k(r)}"
        if several and r["head"] is not None:
            label += f" ({_short(r['head'])})"
        marker = MARKERS[heads.index(r["head"]) % len(MARKERS)]
        looks.append({"label": label, "marker": marker, "color": COLORS[r["decoder"]]})
    return looks


def _names(values: Any) -> list[Any]:
    """Each once, in their order."""
    return list(dict.fromkeys(values))


def _short(name: str) -> str:
    """A name for which there is room."""
    return name if len(name) <= 26 else f"{name[:12]}\N{HORIZONTAL ELLIPSIS}{name[-13:]}"
