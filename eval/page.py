"""The tables of a report, for a terminal and report.md, and report.html: one file with the verdict,
the figures, the tables and some texts.
"""

import io
import re
import sys
from collections.abc import Sequence
from html import escape
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from headstart.common.console import in_markdown, markdown_row, one_line, plain_console
from headstart.eval.plots import INK, STYLE, figures

COLUMNS = [
    "decoder", "K", "category", "texts", "acceptance length (95%)", "a_1 .. a_4", "speedup (95%)",
    "without prefill", "predicted", "tok/s", "equal",
]  # fmt: skip
LEFT = ("decoder", "category")


def cells(result: dict[str, Any]) -> list[str]:
    """One result as a row of `COLUMNS`."""
    low, high = result["speedup_interval"]
    shortest, longest = result["acceptance_length_interval"]
    of_rounds = result["decode_speedup"], result["predicted_decode_speedup"]
    equal = {None: "", True: "yes"}.get(result["equal_to_plain"])
    category = result["category"]
    return [
        decoder_name(result),
        str(result["num_assistant_tokens"]),
        category if result["looping_texts"] == "with" else f"{category}, no loops",
        str(result["texts"]),
        f"{result['acceptance_length']:.2f} ({shortest:.2f} to {longest:.2f})",
        ", ".join(f"{a:.2f}" for a in result["conditional_acceptance_rate"][:4]),
        f"{result['speedup']:.2f} ({low:.2f} to {high:.2f})",
        *("" if speedup is None else f"{speedup:.2f}" for speedup in of_rounds),
        f"{result['tokens_per_second']:.1f}",
        f"{result['parted_share']:.0%} part" if equal is None else equal,
    ]


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
        f"{env['threads']} threads of {env['accelerator'] or env['processor']}"
    )


def by_head(content: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The results of each head; those that need none come under their decoder's name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for result in content["results"]:
        found.setdefault(result["head"] or result["decoder"], []).append(result)
    return found


def remarks(content: dict[str, Any]) -> list[str]:
    """What it takes to read the tables, a sentence or two each."""
    lines = [content["verdict"]]
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
    parted = [p for r in content["results"] for p in r["parted"]]
    if parted:
        worst = max(p["top2_logit_gap"] for p in parted)
        fine = all(p["within_rounding"] for p in parted)
        lines.append(
            "Where texts part from plain decoding, the target's two best logits are at most "
            f"{worst:.3g} apart: "
            + (
                "what rounding may turn around."
                if fine
                else "more than rounding explains in some: a fault."
            )
        )
    return lines


def wide_console() -> Console:
    """For wide tables: outside a terminal rich assumes 80 columns and would fold every cell."""
    return plain_console(None if sys.stdout.isatty() else 165)


def print_report(content: dict[str, Any], console: Console | None = None) -> None:
    """Print the results as tables, one for each head, and what it takes to read them."""
    console = console or wide_console()
    for name, found in by_head(content).items():
        table = Table(title=f"{name} for {title(content)}")
        for column in COLUMNS:
            table.add_column(column, justify="left" if column in LEFT else "right", no_wrap=True)
        for result in found:
            table.add_row(*cells(result))
        console.print(table)
    for line in remarks(content):
        console.print(one_line(line))


def markdown(content: dict[str, Any]) -> str:
    """report.md: the same tables."""
    lines = ["# Evaluation", "", in_markdown(title(content)) + ".", ""]
    for line in remarks(content):
        lines += [in_markdown(line), ""]
    for name, found in by_head(content).items():
        aligned = ["---" if column in LEFT else "---:" for column in COLUMNS]
        lines += [f"## {in_markdown(name)}", ""]
        lines += [markdown_row(COLUMNS), f"| {' | '.join(aligned)} |"]
        lines += [*(markdown_row(cells(result)) for result in found), ""]
    lines += ["report.json has every figure; report.html shows them."]
    return "\n".join(lines) + "\n"


CAPTIONS = {
    "speedup": "Wall time of plain decoding over that of decoding with drafts, with the 95% "
    "interval over prompts. Hollow: what the accepted drafts and the costs measured beforehand "
    "promise for the rounds alone.",
    "acceptance": "Conditional acceptance a_k: how often draft k is accepted where drafts 1 to k-1 "
    "were, with the 95% interval over prompts.",
    "categories": "The best K of each decoder and head (of more than eight the quickest), by "
    "category.",
    "accepted": "Rounds by the drafts that they accepted, for the best K of each decoder and head.",
    "time": "What the time of a token is spent on.",
    "positions": "Acceptance length (tokens a round, the bonus token included) as texts grow, for "
    "the best K of each decoder and head.",
}
KINDS = {
    "accepted": "a draft that the target accepted",
    "bonus": "a token that the target added itself",
    "rejected": "a draft that the target rejected: no part of the text",
}
CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1f24; --dim: #5b616b; --line: #d5d9df;
  --card: #f5f6f8; --accepted: #cfe6f7; --rejected: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181d; --ink: #e6e8ec; --dim: #a2a9b4;
  --line: #3a3f48; --card: #1f2228; --accepted: #174a6e; --rejected: #ff9d8c; } }
body { margin: 0 auto; max-width: 64rem; padding: 1.5rem 1rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.3rem; margin: 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; border-top: 1px solid var(--line);
  padding-top: 1rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
.what, .remark, figcaption, caption { color: var(--dim); font-size: .9rem; }
.what, .remark { margin: .3rem 0; }
.verdict { font-size: 1.5rem; line-height: 1.35; margin: 1.2rem 0; }
.wide { overflow-x: auto; }
figure { margin: 1.5rem 0 2.5rem; }
figcaption { margin-bottom: .4rem; }
svg { display: block; width: 100%; min-width: 40rem; height: auto; }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .45rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; overflow-wrap: normal; }
.left, .facts th, .facts td { text-align: left; }
.facts td { white-space: normal; overflow-wrap: anywhere; }
.facts th, .part { color: var(--dim); font-weight: normal; }
.text { white-space: pre-wrap; background: var(--card); border-radius: .4rem; padding: .7rem .9rem;
  font: .85rem/1.8 ui-monospace, monospace; }
.prompt { border-left: .3rem solid var(--line); line-height: 1.5; color: var(--dim); }
.accepted { background: var(--accepted); border-radius: .2rem; }
.bonus { border-bottom: 1px dotted var(--dim); }
.rejected { color: var(--rejected); text-decoration: line-through; opacity: .85; }
.text span, .text del { margin-right: 1px; }
.text i { font-style: normal; color: var(--dim); }
"""
# Beyond escaping: nothing that a prompt holds could run, or fetch anything.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(content: dict[str, Any]) -> str:
    """The whole file; the same for the same content.

    Args:
        content: of report.json (docs/report.md).
    """
    told, *notes = map(escape, remarks(content))
    name = escape(content["environment"]["target"])
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Draft heads for {name}</title><style>{CSS}</style></head><body>",
        f"<h1>Draft heads for {name}</h1>",
        f'<p class="what">{escape(title(content))}</p>',
        f'<p class="verdict">{told}</p>',
        *(f'<p class="remark">{note}</p>' for note in notes),
        *_figures(content),
        "<h2>Results</h2>",
        *(_table(head, found) for head, found in by_head(content).items()),
        "<h2>Texts</h2>",
        *_texts(content["examples"]),
        "<h2>What was measured</h2>",
        _facts(content["environment"]),
        '<p class="remark">report.json, beside this page, has every figure.</p>',
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _figures(content: dict[str, Any]) -> list[str]:
    parts = []
    temperatures = list(dict.fromkeys(r["temperature"] for r in content["results"]))
    for i, temperature in enumerate(temperatures):
        warm = f" at temperature {temperature:g}" if temperature or len(temperatures) > 1 else ""
        parts.append(f"<h2>Figures{warm}</h2>")
        for name, figure in figures(content, temperature).items():
            svg = as_svg(figure, f"{name}{i}", CAPTIONS[name])
            caption = f"<figcaption>{escape(CAPTIONS[name])}</figcaption>"
            parts.append(f'<figure>{caption}<div class="wide">{svg}</div></figure>')
    return parts


def as_svg(figure: Figure, prefix: str, label: str) -> str:
    """An `<svg>` to stand in a page, in the colour of its text.

    Args:
        figure: of `figures`.
        prefix: of the ids in it, which no other picture of the page has.
        label: what it shows, for those who cannot see it.
    """
    text = io.StringIO()
    nothing = dict.fromkeys(["Date", "Creator", "Format", "Type"])
    with style.context(["default", STYLE, {"svg.hashsalt": prefix}]):
        figure.savefig(text, format="svg", metadata=nothing)
    # The svg element itself gets a size from the page; what stands before it is for files.
    box, rest = re.split(r'<svg[^>]* (viewBox="[^"]*")[^>]*>', text.getvalue(), maxsplit=1)[1:]
    rest = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", rest)
    rest = rest.replace("xlink:href", "href").replace(INK, "currentColor")
    return f'<svg {box} role="img" aria-label="{escape(label)}">{rest.strip()}'


def _table(head: str, results: Sequence[dict[str, Any]]) -> str:
    sides = [' class="left"' if column in LEFT else "" for column in COLUMNS]
    rows = [f"<th{side}>{escape(column)}</th>" for side, column in zip(sides, COLUMNS, strict=True)]
    lines = ["<tr>" + "".join(rows) + "</tr>"]
    for result in results:
        whole = result["category"] == "all" and result["looping_texts"] == "with"
        cols = zip(sides, cells(result), strict=True)
        row = "".join(f"<td{side}>{escape(cell)}</td>" for side, cell in cols)
        lines.append(f"<tr>{row}</tr>" if whole else f'<tr class="part">{row}</tr>')
    return f'<h3>{escape(head)}</h3><div class="wide"><table>{"".join(lines)}</table></div>'


def _texts(examples: Sequence[dict[str, Any]]) -> list[str]:
    legend = ", ".join(f"{_mark(kind, kind)} {what}" for kind, what in KINDS.items())
    parts = [f'<p class="remark">Of the quickest side. {legend}.</p>']
    for example in examples:
        kinds = [kind for _, kind in example["tokens"]]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in KINDS)
        head = f" of {example['head']}" if example["head"] is not None else ""
        k = example["num_assistant_tokens"]
        warm = f", temperature {example['temperature']:g}" if example["temperature"] else ""
        side = f"{example['decoder']}{head}, up to {k} drafts{warm}"
        parts += [
            f"<h3>{escape(example['id'])} ({escape(example['category'])})</h3>",
            f'<p class="remark">{escape(side)}: {counts}. The end of the prompt, and the text:</p>',
            f'<div class="text prompt">{escape(example["prompt"])}</div>',
            f'<p class="text">{"".join(_mark(*token) for token in example["tokens"])}</p>',
        ]
    return parts


def _mark(text: str, kind: str) -> str:
    """A token in the colour of its kind; its line ends can be seen, and break the text's lines."""
    tag, end = ("del", "") if kind == "rejected" else ("span", "\n")
    shown = escape(text).replace("\n", f"<i>\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}</i>{end}")
    return f'<{tag} class="{escape(kind)}">{shown}</{tag}>'


def _facts(environment: dict[str, Any]) -> str:
    rows = []
    for name, value in environment.items():
        if value in (None, []):
            continue
        if name.endswith("_bytes"):
            name, value = name.removesuffix("_bytes"), f"{value / 1e9:.2f} GB"
        shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        rows.append(f"<tr><th>{escape(name.replace('_', ' '))}</th><td>{escape(shown)}</td></tr>")
    return f'<div class="wide"><table class="facts">{"".join(rows)}</table></div>'
