"""A report as tables, for a terminal and report.md, as a page, report.html, and as JSON."""

import io
import json
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from matplotlib import style
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from headstart.common.console import in_markdown, markdown_row, one_line, plain_console
from headstart.common.files import write_atomically
from headstart.common.machine import machine_name
from headstart.eval.concurrency import COLUMNS as SEVERAL_COLUMNS
from headstart.eval.concurrency import table_of, where_it_pays
from headstart.eval.plots import INK, STYLE, figures, group_name
from headstart.eval.recorded import describe_set, recorded_set
from headstart.eval.statistics import merit, sampling_name, with_interval

COLUMNS = [
    "decoder", "K", "category", "texts", "acceptance length (95%)", "a_1 .. a_4", "speedup (95%)",
    "without prefill", "predicted", "tok/s", "equal",
]  # fmt: skip
LEFT = ("decoder", "category")
SCHEMA = 4  # of report.json; it rises when a key changes
READ = (3, SCHEMA)  # which are read; 3 lacks `by_span` and `by_context`
TEMPLATE = Path(__file__).with_name("report.html.jinja")


def cells(result: dict[str, Any]) -> list[str]:
    """One result as a row of `COLUMNS`."""
    of_rounds = result["decode_speedup"], result["predicted_decode_speedup"]
    equal = {None: "", True: "yes"}.get(result["equal_to_plain"])
    return [
        decoder_name(result),
        str(result["num_assistant_tokens"]),
        group_name(result),
        str(result["texts"]),
        with_interval(result["acceptance_length"], result["acceptance_length_interval"]),
        ", ".join(f"{a:.2f}" for a in result["conditional_acceptance_rate"][:4]),
        "" if result["speedup"] is None else _speedup(result),
        *("" if speedup is None else f"{speedup:.2f}" for speedup in of_rounds),
        "" if result["tokens_per_second"] is None else f"{result['tokens_per_second']:.1f}",
        f"{result['diverged_share']:.0%} diverge" if equal is None else equal,
    ]


def _speedup(result: dict[str, Any]) -> str:
    return with_interval(result["speedup"], result["speedup_interval"])


def decoder_name(result: dict[str, Any]) -> str:
    """The decoder, and the temperature where it samples."""
    warm = f" T={result['temperature']:g}" if result["temperature"] else ""
    return f"{result['decoder']}{warm}"


def title(content: dict[str, Any]) -> str:
    """What was measured, and where."""
    env = content["environment"]
    kwargs = env.get("chat_template_kwargs") or {}  # reports of before do not say
    asked = "".join(f"{name}={value}, " for name, value in kwargs.items())
    return (
        f"{env['target']}, {env['dtype']}, {asked}{env['max_new_tokens']} new tokens, "
        f"{machine_name(env)}"
    )


def prompts_line(content: dict[str, Any]) -> str:
    """Which prompts were asked."""
    return f"Prompts: {describe_set(recorded_set(content['environment']))}"


def by_head(content: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The results of each head; those that need none come under their decoder's name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for result in content["results"]:
        found.setdefault(result["head"] or result["decoder"], []).append(result)
    return found


def report_warnings(content: dict[str, Any]) -> list[str]:
    """What it takes to read the tables, a sentence or two each."""
    lines = [content["verdict"], *where_it_pays(content.get("concurrency", []))]
    lines += [f"{name}: {warning}" for name, warning in content.get("warnings", {}).items()]
    lines += _sampled(content)
    if (noise := content["noise"]) is not None:
        low, high = noise["speedup_interval"]
        lines.append(
            f"Noise: plain decoding measured twice on {noise['texts']} of the texts is "
            f"{noise['speedup']:.2f} times as fast as itself ({low:.2f} to {high:.2f})."
        )
    if content["environment"].get("prefill_skips_layers"):  # reports of before do not say
        lines.append(
            "From transformers 5.23 on plain decoding runs on the last token of the prompt alone "
            "in layers that share keys, and decoding with a head on all tokens: the longer the "
            "prompt, the lower the speedup. The column 'without prefill' is what drafting gives."
        )
    if longer := content["environment"].get("longer_than_trained"):
        lines.append(
            f"{longer} of the prompts are longer than those of the head's training, which kept "
            "their last data.max_prompt_tokens; here they are whole."
        )
    for name, costs in content["costs"].items():
        for decoder, cost in costs.items():
            v = ", ".join(f"{value:.2f}" for value in cost["v"][1:])
            lines.append(
                f"Costs in target steps, {name}, {decoder}: a draft {cost['c']:.3f}; "
                f"verifying 1 to {len(cost['v']) - 1} drafts {v}."
            )
    if (line := _divergence(content)) is not None:
        lines.append(line)
    return lines


def print_report(content: dict[str, Any], console: Console | None = None) -> None:
    """Print what fits 80 columns: a table of each head with a line for each decoder and K, over all
    texts, and the verdict. All figures are in report.html, report.md and report.json.

    Args:
        content: of report.json.
        console: None: the terminal's.
    """
    console = console or plain_console()
    console.print(one_line(f"Evaluation: {title(content)}"))
    tables = by_head(content)
    if len(heads := {r["head"] for r in content["results"]} - {None}) == 1:
        tables = {heads.pop(): content["results"]}  # those that need no head stand beside it
    for name, found in tables.items():
        names = ("decoder", "K", "acceptance length (95%)", "speedup (95%)")
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in names:
            table.add_column(column, justify="left" if column in LEFT else "right", no_wrap=True)
        for result in found:
            if result["category"] == "all" and result["looping_texts"] == "with":
                row = dict(zip(COLUMNS, cells(result), strict=True))
                table.add_row(*(row[column] for column in names))
        console.print(one_line(name))
        console.print(table)
    several = where_it_pays(content.get("concurrency", []))
    for line in (content["verdict"], *several, *_sampled(content)):
        console.print(one_line(line))
    if (line := _divergence(content)) is not None and FAULT in line:
        console.print(line)


def _sampled(content: dict[str, Any]) -> list[str]:
    """What sampled rows are, a sentence or two for each way to sample."""
    ways = {sampling_name(r): r for r in content["results"] if r["temperature"]}
    lines = []
    for way, result in ways.items():
        if seeds := result.get("seeds"):  # reports of before do not say
            way += f", seeds {', '.join(map(str, seeds))}"
        lines.append(
            f"Rows with T={result['temperature']:g} are sampled, at {way}, and compared with plain "
            "decoding that samples alike. Intervals are over prompts, each with all of its texts."
        )
    return lines


FAULT = "a fault."  # ends what is said of texts that diverge for no reason


def _divergence(content: dict[str, Any]) -> str | None:
    """How nearly tied the target's best tokens are where texts diverge; None: none does."""
    if not (diverged := [p for r in content["results"] for p in r["diverged"]]):
        return None
    worst = max(p["top2_logit_gap"] for p in diverged)
    why = f"more than rounding explains in some: {FAULT}"
    if all(p["within_rounding"] for p in diverged):
        why = "what rounding may turn around."
    return (
        "Where texts diverge from plain decoding, the target's two best logits are at most "
        f"{worst:.3g} apart: {why}"
    )


OF_HEADS = ("exact", "transformers")
"""Decoders whose drafts are all the head's, as many a round as they are told, as in servers; the
one to look at first comes first."""
SPAN_COLUMNS = ["span", "tokens", "rounds", "acceptance length", "without looping texts",
                "a_1 .. a_4", "predicted speedup", "share of the steps saved"]  # fmt: skip
CONTEXT_COLUMNS = [
    "tokens before the round",
    "rounds",
    "acceptance length (95%)",
    "texts",
    "speedup (95%)",
    "without the prefill",
]
STRUCTURED_COLUMNS = [
    "decoder", "K", "texts", "ended before the limit", "of those valid", "acceptance length (95%)",
]  # fmt: skip
Rows = list[list[str]]


def breakdowns(content: dict[str, Any]) -> list[tuple[str, list[str], Rows]]:
    """Tables over all texts, of the quickest variant or of all: heading, columns and rows."""
    whole = [
        r for r in content["results"] if r["category"] == "all" and r["looping_texts"] == "with"
    ]
    # What the head does is seen where it drafts alone: lookups copy what the text has anyway.
    best = max([r for r in whole if r["decoder"] in OF_HEADS] or whole, key=merit)
    of = f"{decoder_name(best)}, K = {best['num_assistant_tokens']}"
    tables: list[tuple[str, list[str], Rows]] = []
    if "by_span" in best:  # reports of before lack both
        own = span_rows(best["by_span"], straight_spans(content, best))
        tables.append((f"What the text is ({of})", SPAN_COLUMNS, own))
        rows = context_rows(best["by_context"])
        tables.append((f"Length of the context ({of})", CONTEXT_COLUMNS, rows))
    several = content.get("concurrency", [])  # reports of before have none
    for head in dict.fromkeys(row["head"] for row in several):
        own = table_of([row for row in several if row["head"] == head])
        tables.append((f"Several texts at once ({head})", SEVERAL_COLUMNS, own))
    if rows := [structured_row(r) for r in whole if r.get("structured")]:
        tables.append(("Texts that are held to a JSON schema", STRUCTURED_COLUMNS, rows))
    return tables


def straight_spans(content: dict[str, Any], of: dict[str, Any]) -> list[dict[str, Any]]:
    """`by_span` of the same variant over the texts that do not loop; empty: all texts loop."""
    if not of["loops"]:  # then there is one result for both
        return list(of["by_span"])
    same = ("head", "decoder", "num_assistant_tokens", "temperature", "category")
    for result in content["results"]:
        straight = result["looping_texts"] == "without"
        if straight and all(result[key] == of[key] for key in same):
            return list(result["by_span"])
    return []


def span_rows(spans: list[dict[str, Any]], straight: list[dict[str, Any]]) -> Rows:
    """The cells of `SPAN_COLUMNS`, of a result's `by_span`, and of that without looping texts."""
    lengths = {s["span"]: s["acceptance_length"] for s in straight}

    def form(value: float | None, form: str) -> str:
        # A share that rounds to nothing has no sign.
        return "" if value is None else format(value, form).replace("-0%", "0%")

    return [
        [
            s["span"],
            str(s["tokens"]),
            str(s["rounds"]),
            form(s["acceptance_length"], ".2f"),
            form(lengths.get(s["span"]), ".2f"),
            _rates(s),
            form(s["predicted_decode_speedup"], ".2f"),
            form(s["saved_share"], ".0%"),
        ]
        for s in spans
    ]


def _rates(span: dict[str, Any]) -> str:
    """a_1 .. a_4; of drafts that no round reached there is none."""
    pairs = zip(span["conditional_acceptance_rate"], span["reached"], strict=True)
    return ", ".join(f"{a:.2f}" if reached else "-" for a, reached in list(pairs)[:4])


def context_rows(groups: list[dict[str, Any]]) -> Rows:
    """The cells of `CONTEXT_COLUMNS`, of a result's `by_context`."""
    return [
        [
            f"from {group['from']}",
            str(group["rounds"]),
            _context_length(group),
            str(group["texts"]),
            "" if group["speedup"] is None else _speedup(group),
            "" if group.get("decode_speedup") is None else f"{group['decode_speedup']:.2f}",
        ]
        for group in groups
    ]


def _context_length(group: dict[str, Any]) -> str:
    length, ends = group["acceptance_length"], group.get("acceptance_length_interval")
    return f"{length:.2f}" if ends is None else with_interval(length, ends)  # reports of before


def structured_row(result: dict[str, Any]) -> list[str]:
    """The cells of `STRUCTURED_COLUMNS`."""
    found, cell = result["structured"], dict(zip(COLUMNS, cells(result), strict=True))
    counts = (str(found[name]) for name in ("texts", "ended", "valid"))
    return [cell["decoder"], cell["K"], *counts, cell["acceptance length (95%)"]]


def markdown(content: dict[str, Any]) -> str:
    """report.md: the same tables."""
    lines = ["# Evaluation", "", in_markdown(title(content)) + ".", ""]
    lines += [in_markdown(prompts_line(content)) + ".", ""]
    for line in report_warnings(content):
        lines += [in_markdown(line), ""]
    for name, found in by_head(content).items():
        aligned = ["---" if column in LEFT else "---:" for column in COLUMNS]
        lines += [f"## {in_markdown(name)}", ""]
        lines += [markdown_row(COLUMNS), f"| {' | '.join(aligned)} |"]
        lines += [*(markdown_row(cells(result)) for result in found), ""]
    for heading, columns, rows in breakdowns(content):
        aligned = ["---", *["---:"] * (len(columns) - 1)]
        lines += [f"## {in_markdown(heading)}", ""]
        lines += [markdown_row(columns), f"| {' | '.join(aligned)} |"]
        lines += [*(markdown_row(row) for row in rows), ""]
    return "\n".join([*lines, "report.json has every figure; report.html shows them.", ""])


def page(content: dict[str, Any]) -> str:
    """report.html, one file that fetches nothing; the same for the same content."""
    template = Environment(
        autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True,
        lstrip_blocks=True,
    ).from_string(TEMPLATE.read_text(encoding="utf-8"))  # fmt: skip
    temperatures = list(dict.fromkeys(r["temperature"] for r in content["results"]))
    drawings = {}
    for i, temperature in enumerate(temperatures):
        warm = f" at temperature {temperature:g}" if temperature or len(temperatures) > 1 else ""
        drawn = figures(content, temperature)
        drawings[f"Figures{warm}"] = {name: _svg(f, f"{name}{i}") for name, f in drawn.items()}
    asked = describe_set(recorded_set(content["environment"]))
    return template.render(
        environment=content["environment"] | {"prompt_set": asked},
        title=title(content),
        prompts_line=prompts_line(content),
        report_warnings=report_warnings(content),
        drawings=drawings,
        columns=COLUMNS,
        left=LEFT,
        tables={
            head: [(r["category"] == "all" and r["looping_texts"] == "with", cells(r)) for r in own]
            for head, own in by_head(content).items()
        },
        breakdowns=breakdowns(content),
        examples=content["examples"],
    )


def _svg(figure: Figure, prefix: str) -> tuple[str, str]:
    """The `viewBox` of a figure and all that follows its `<svg ...>`, in the color of the page;
    with a prefix of the ids in it, which no other picture of the page has."""
    text = io.StringIO()
    nothing = dict.fromkeys(["Date", "Creator", "Format", "Type"])
    with style.context(["default", STYLE, {"svg.hashsalt": prefix}]):
        figure.savefig(text, format="svg", metadata=nothing)
    # The svg element itself gets a size from the page; what stands before it is for files.
    box, rest = re.split(r'<svg[^>]* (viewBox="[^"]*")[^>]*>', text.getvalue(), maxsplit=1)[1:]
    rest = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", rest)
    return box, rest.replace("xlink:href", "href").replace(INK, "currentColor").strip()


def write_report(content: dict[str, Any], out: Path) -> None:
    """Write report.json, report.md and report.html into a folder."""
    write_atomically(out / "report.json", as_json(content))
    write_atomically(out / "report.md", markdown(content))
    write_atomically(out / "report.html", page(content))


def as_json(content: dict[str, Any]) -> str:
    """JSON with each result, and each example, on a line of its own."""
    parts = []
    for key, value in content.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines = ",\n".join("    " + json.dumps(item) for item in value)
            parts.append(f"  {json.dumps(key)}: [\n{lines}\n  ]")
        else:
            text = json.dumps(value, indent=2).replace("\n", "\n  ")
            parts.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
