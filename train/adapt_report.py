"""What an adaptation came to: the head before and after, on the texts of the same prompts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure

from headstart.common.console import in_markdown, markdown_row
from headstart.common.files import atomic_file
from headstart.eval.plots import STYLE
from headstart.eval.recorded import describe_set
from headstart.eval.replay import ReplayedText, describe_replayed, length_draws
from headstart.eval.statistics import interval, resampled, with_interval

TextsOfKinds = dict[str, list[ReplayedText]]  # kind (`domain`, `general`) -> texts
STAGES = {
    "reference": "the head on the target that it was trained for",
    "unadapted": "the same head on the tuned target",
    "adapted": "the adapted head on the tuned target",
}
COLORS = {"reference": "#948A00", "unadapted": "#0072B2", "adapted": "#D55E00"}


def compare_stages(stages: dict[str, TextsOfKinds]) -> dict[str, Any]:
    """Acceptance of each stage on each kind of prompt, and what lies between them.

    Args:
        stages: `unadapted`, and `reference` and `adapted` where they are there.

    Returns:
        Kind -> stage -> `describe_replayed`, with `lost` (unadapted from reference) and `gained`
        (adapted from unadapted) as differences in acceptance length with 95% intervals over
        prompts.
    """
    found: dict[str, Any] = {}
    for kind in stages["unadapted"]:
        own = {stage: texts[kind] for stage, texts in stages.items()}
        found[kind] = {stage: describe_replayed(texts) for stage, texts in own.items()}
        for name, before, after in (
            ("lost", "reference", "unadapted"), ("gained", "unadapted", "adapted"),
        ):  # fmt: skip
            if before in own and after in own:
                found[kind][name] = _difference(own[before], own[after])
    return found


def _difference(before: Sequence[ReplayedText], after: Sequence[ReplayedText]) -> dict[str, Any]:
    """Over the prompts that have a round in both."""
    shared = {text.id for text in before} & {text.id for text in after}
    one, two = (
        sorted((t for t in texts if t.id in shared), key=lambda t: t.id)
        for texts in (before, after)
    )
    draws = length_draws(two) - length_draws(one)
    return {"difference": float(draws[0]), "difference_interval": interval(draws)}


def headline(compared: dict[str, Any]) -> dict[str, Any]:
    """The figures that an adaptation is judged by; None where they were not measured.

    `recovered_share`: of the accepted tokens that the domain lost, those that came back; and the
    same where each stage counts its texts without loops alone, since a target that loops flatters
    the head that it had; None too where chance explains the loss, of which a share says nothing.
    `general_change_share`: accepted tokens on general prompts after, over those before, less one;
    None where chance explains that there were any before.
    """
    domain = compared["domain"]
    lengths = {
        f"{stage}_acceptance_length": domain[stage]["acceptance_length"]
        if stage in domain
        else None
        for stage in STAGES
    }
    change = None
    if "general" in compared and "adapted" in compared["general"]:
        before, after = (
            compared["general"][stage]["acceptance_length"] - 1
            for stage in ("unadapted", "adapted")
        )
        least, _ = compared["general"]["unadapted"]["acceptance_length_interval"]
        change = after / before - 1 if before > 0 and least > 1 else None
    return lengths | {
        "recovered_share": _recovered(domain, "acceptance_length"),
        "recovered_share_without_loops": _recovered(domain, "acceptance_length_without_loops"),
        "general_change_share": change,
    }


def _recovered(domain: dict[str, Any], name: str) -> float | None:
    """None: a stage is missing, or nothing was lost but by chance."""
    reference, unadapted, adapted = (domain[s].get(name) if s in domain else None for s in STAGES)
    if reference is None or unadapted is None or adapted is None or reference <= unadapted:
        return None
    if _lost_by_chance(domain):
        return None
    recovered: float = (adapted - unadapted) / (reference - unadapted)
    return recovered


def _lost_by_chance(domain: dict[str, Any]) -> bool:
    _, high = domain["lost"]["difference_interval"]
    return bool(high >= 0)


def advice(compared: dict[str, Any]) -> str:
    """Whether adapting is worth it, from what was measured before it."""
    domain = compared["domain"]
    now = f"The head is accepted at {_length(domain['unadapted'])} tokens a round here"
    if "lost" not in domain:
        return f"{now}. What it had on its own target is not known (adapt.base)."
    lost, (low, high) = domain["lost"]["difference"], domain["lost"]["difference_interval"]
    before = domain["reference"]["acceptance_length"]
    if _lost_by_chance(domain):
        return (
            f"{now}, and at {_length(domain['reference'])} on its own target: chance explains the "
            "difference, so that little may have been lost. Training on may still gain something."
        )
    share = -lost / (before - 1)
    return (
        f"{now}, and at {_length(domain['reference'])} on its own target: it lost {share:.0%} of "
        f"its accepted tokens ({lost:+.2f}, {low:+.2f} to {high:+.2f}). Adapting it is worth it."
        + _loops(domain)
    )


def _loops(domain: dict[str, Any]) -> str:
    """What to say where the plain target's texts loop more than the tuned one's."""
    reference, unadapted = domain["reference"], domain["unadapted"]
    if reference["looping_share"] - unadapted["looping_share"] < 0.1:
        return ""
    without = reference["acceptance_length_without_loops"]
    return (
        f" But {reference['looping_share']:.0%} of that target's texts end in a loop, which "
        f"flatters drafts ({unadapted['looping_share']:.0%} here)"
        + (f"; without them it had {without:.2f}." if without else ".")
    )


def outcome(content: dict[str, Any]) -> str:
    """One paragraph on what the adaptation brought."""
    domain = content["acceptance"]["domain"]
    gained, (low, high) = domain["gained"]["difference"], domain["gained"]["difference_interval"]
    text = (
        f"Adapted: {_length(domain['unadapted'])} to {_length(domain['adapted'])} accepted "
        "tokens a "
        f"round on the target's new work ({gained:+.2f}, {low:+.2f} to {high:+.2f})"
    )
    if content["recovered_share"] is not None:
        text += f", {content['recovered_share']:.0%} of what was lost"
        straight = content["recovered_share_without_loops"]
        if straight is not None and _loops(domain):
            text += f" ({straight:.0%} where looping texts are left out)"
    elif "lost" in domain and _lost_by_chance(domain):
        text += ", where what was lost before is within chance"
    if content["general_change_share"] is not None:
        text += f"; on general prompts {content['general_change_share']:+.0%} accepted tokens"
    if low <= 0:
        text += ". Chance may explain the gain: keep the head that you have, or give it more time"
    if content.get("speedup"):
        speeds = content["speedup"]["domain"]
        told = [
            f"{speeds[s]['speedup']:.2f} ({speeds[s]['interval'][0]:.2f} to "
            f"{speeds[s]['interval'][1]:.2f})"
            for s in ("unadapted", "adapted")
        ]
        text += f". Speedup over plain decoding {told[0]} before, {told[1]} after"
    return text + "."


def _length(described: dict[str, Any]) -> str:
    return f"{described['acceptance_length']:.2f}"


def speedups(report: dict[str, Any], stages: dict[str, str]) -> dict[str, Any]:
    """Speedup over plain decoding with 95% intervals over prompts: kind -> stage.

    Args:
        report: of `run_evaluation` over prompts whose categories begin with their kind.
        stages: stage -> name of its head there.
    """
    columns = report["per_text_columns"]
    found: dict[str, Any] = {}
    for stage, head in stages.items():
        result = next(r for r in report["results"] if r["head"] == head and "per_text" in r)
        rows = [dict(zip(columns, row, strict=True)) for row in result["per_text"]]
        for kind in dict.fromkeys(row["category"].partition(":")[0] for row in rows):
            own = [row for row in rows if row["category"].startswith(f"{kind}:")]
            names = ("plain_seconds", "plain_tokens", "seconds", "tokens")
            sums = resampled([row["id"] for row in own], [[row[n] for n in names] for row in own])
            draws: np.ndarray = (sums[:, 0] / sums[:, 1]) / (sums[:, 2] / sums[:, 3])
            found.setdefault(kind, {})[stage] = {
                "speedup": float(draws[0]), "interval": interval(draws), "prompts": len(own),
            }  # fmt: skip
    return found


def adaptation_markdown(content: dict[str, Any]) -> str:
    """adapt.md."""
    told = [in_markdown(content[what]) for what in ("verdict", "advice")]
    lines = ["# Adaptation of a draft head", "", told[0], "", told[1], ""]
    target, head = in_markdown(content["target"]["name"]), in_markdown(content["head"])
    lines += [f"Target: {target}. Head: {head}.", ""]
    for kind, sets in content.get("prompt_sets", {}).items():  # reports of before do not say
        lines += [f"Prompts, {kind}: {in_markdown(', '.join(map(describe_set, sets)))}.", ""]
    if kwargs := content.get("chat_template_kwargs"):
        asked = ", ".join(f"{name}={value}" for name, value in kwargs.items())
        lines += [f"All prompts are asked with {in_markdown(asked)}.", ""]
    stages = [stage for stage in STAGES if stage in content["acceptance"]["domain"]]
    lines += [
        f"Acceptance length at K = {content['num_assistant_tokens']}, simulated over the target's "
        "greedy answers to prompts that nothing was trained on (95% over prompts):", "",
        "| prompts | " + " | ".join(stages) + " |", "| --- |" + " --- |" * len(stages),
    ]  # fmt: skip
    for kind, found in content["acceptance"].items():
        cells = [
            with_interval(its["acceptance_length"], its["acceptance_length_interval"])
            for its in (found[stage] for stage in stages)
        ]
        lines.append(markdown_row([kind, *cells]))
        for category in found["unadapted"]["categories"]:
            lengths = [
                _length(one) if (one := found[stage]["categories"].get(category)) else ""
                for stage in stages
            ]
            lines.append(markdown_row([f"{kind}: {category}", *lengths]))
    lines += ["", *[f"- {name}: {what}" for name, what in STAGES.items() if name in stages], ""]
    if content.get("speedup"):
        lines += ["| speedup over plain decoding | unadapted | adapted |", "| --- | --- | --- |"]
        for kind, one in content["speedup"].items():
            cells = [
                with_interval(one[s]["speedup"], one[s]["interval"])
                for s in ("unadapted", "adapted")
            ]
            lines.append(markdown_row([f"{kind}, {one['unadapted']['prompts']} prompts", *cells]))
        lines.append("")
    took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in content["seconds"].items())
    lines += [f"Time: {took}.", ""]
    if content["commands"]:
        lines += ["```sh", *content["commands"], "```", ""]
    return "\n".join(lines)


def plot_adaptation(content: dict[str, Any], path: Path) -> None:
    """Acceptance length of each stage, a group of bars for each kind and category of prompts."""
    acceptance = content["acceptance"]
    stages = [stage for stage in STAGES if stage in acceptance["domain"]]
    groups = []
    for kind, found in acceptance.items():
        groups.append((kind, {s: found[s] for s in stages}))
        for category in found["unadapted"]["categories"]:
            own = {s: found[s]["categories"].get(category) for s in stages}
            groups.append((f"{kind}: {category}", {s: one for s, one in own.items() if one}))
    white = {"figure.facecolor": "white", "axes.facecolor": "white"}
    with style.context(["default", STYLE | white]):
        size = (9.0, 1.2 + 0.22 * len(groups) * len(stages))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        height = 0.8 / len(stages)
        for number, stage in enumerate(stages):
            places, values, errors = [], [], []
            for i, (_, found) in enumerate(groups):
                if stage in found:
                    value = found[stage]["acceptance_length"]
                    low, high = found[stage].get("acceptance_length_interval", (value, value))
                    places.append(i + (number - (len(stages) - 1) / 2) * height)
                    values.append(value)
                    errors.append((value - low, high - value))
            axes.barh(
                places, [v - 1 for v in values], height, left=1, color=COLORS[stage], label=stage,
                xerr=np.array(errors).T, error_kw={"elinewidth": 0.8, "ecolor": "#777679"},
            )  # fmt: skip
        axes.set_yticks(range(len(groups)), [name for name, _ in groups])
        axes.invert_yaxis()
        axes.set(
            xlabel=f"acceptance length at K = {content['num_assistant_tokens']}", xlim=(1, None)
        )
        axes.legend(loc="lower right")
        with atomic_file(path) as work:
            figure.savefig(work, dpi=120)
