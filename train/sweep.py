"""`headstart sweep`: train runs that differ in some settings, and judge them on the same texts.

Heads are judged by walking rounds over stored texts, as `headstart eval --simulate` does: without
decoding, so that what is compared is acceptance and no clock.

Letters: K draft tokens a round.
"""

import json
from pathlib import Path
from typing import Any

import torch
from matplotlib import style
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from headstart.common.console import plain_console, say
from headstart.common.files import whole_file, write_atomically
from headstart.common.machine import environment
from headstart.configs.loader import dump_config, load_yaml, meant
from headstart.configs.schema import Config
from headstart.configs.sweep import Sweep
from headstart.data.store import ActivationStore
from headstart.eval.replay import Walked, length_draws, total_counts, walk_texts
from headstart.eval.statistics import interval
from headstart.heads.loading import open_target
from headstart.heads.saving import load_assistant
from headstart.heads.target import Target
from headstart.heads.unroll import DraftHead, walked_at
from headstart.train.loop import train
from headstart.train.run_folder import read_metrics

JUDGED = "judged.json"  # in a run's folder: what became of it


def run_sweep(
    sweep: Sweep, out: Path, overrides: list[str], device: torch.device | str
) -> dict[str, Any]:
    """Train and judge the runs of a sweep, and write `out`/sweep.json and sweep.png.

    A run that was judged stays as it is, one that was judged on other texts or at another K is
    judged again, one that was cut short goes on from its checkpoint. The files are written anew
    after each run.

    Args:
        sweep: of `load_sweep`.
        out: folder of the runs.
        overrides: `section.key=value` for every run.
        device: where heads are judged.

    Returns:
        What sweep.json holds.

    Raises:
        ValueError: a setting or a store does not fit, or `out` holds runs of other settings.
    """
    runs = sweep.configs(out, overrides)
    target = open_target(runs[0][1].target, device)
    stores = {name: ActivationStore(on.store, target) for name, on in sweep.judged_on.items()}
    for _, config in runs:
        _check_same(config)
    found: list[dict[str, Any]] = []
    content: dict[str, Any] = {}
    for number, (name, config) in enumerate(runs, start=1):
        judged = _read_judged(config)
        if judged is None:
            say(f"Run {number} of {len(runs)}: {name}, seed {config.run.seed}")
            train(config, resume=True)
        if judged is None or judged.get("judging") != _judging(sweep):
            judged = _judge(config, target, stores, sweep)
        found.append({"run": name, "overrides": sweep.runs[name], **judged})
        content = {
            "sweep": 1,
            "environment": environment(target.device) | {"target": target.name},
            **sweep.model_dump(mode="json", exclude={"runs"}),
            "results": summarise(found, list(stores)),
        }
        write_atomically(out / "sweep.json", json.dumps(content, indent=2) + "\n")
        plot_sweep(content, out / "sweep.png")
    print_sweep(content)
    return content


def _check_same(config: Config) -> None:
    """Raise `ValueError` where a judged run had other settings."""
    if (judged := _read_judged(config)) is None:
        return
    # Settings that are newer than the run had their defaults.
    earlier = Config.model_validate(meant(load_yaml(judged["config"]), Config))
    if dump_config(earlier) != dump_config(config):
        raise ValueError(
            f"{config.run.dir} was judged with other settings: name another folder, --out DIR, "
            "or delete it"
        )


def _read_judged(config: Config) -> dict[str, Any] | None:
    """What became of a run; None: it was not judged."""
    path = config.run.dir / JUDGED
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _judging(sweep: Sweep) -> dict[str, Any]:
    """How runs are judged, which may change after they were trained."""
    return sweep.model_dump(mode="json", include={"judged_on", "num_assistant_tokens"})


def _judge(
    config: Config, target: Target, stores: dict[str, ActivationStore], sweep: Sweep
) -> dict[str, Any]:
    """Walk rounds over every text of the stores; counts of each are kept in the run's folder."""
    folder = config.run.dir
    head = DraftHead(load_assistant(folder / "head", target.table.dtype, target.device))
    ahead = {name: walked_at(on.rope_position) for name, on in sweep.judged_on.items()}
    walked = walk_texts(head, target, stores, sweep.num_assistant_tokens, "Judging", ahead)
    texts = {name: [text.row() for text in found] for name, found in walked.items()}
    rows = read_metrics(folder)
    judged = {
        "seed": config.run.seed,
        "steps": config.train.steps,
        "loss": rows[-1]["loss"],
        "held_out": max(row.get("acceptance_length", 0.0) for row in rows),
        "texts": texts,
        "config": dump_config(config),
        "judging": _judging(sweep),
    }
    write_atomically(folder / JUDGED, json.dumps(judged) + "\n")
    return judged


def summarise(found: list[dict[str, Any]], stores: list[str]) -> list[dict[str, Any]]:
    """One result a run, its seeds together, beside the first run.

    Args:
        found: run, overrides, seed and the counts of each text, in the order of the runs.
        stores: names of what they were judged on.

    Returns:
        Of each run, for each store: acceptance length and conditional acceptance over all seeds,
        the 95% interval over other texts, the difference from the first run with the interval of
        that (same texts, same draws), and the acceptance length of each seed.
    """
    names = list(dict.fromkeys(one["run"] for one in found))
    results = []
    for name in names:
        own = [one for one in found if one["run"] == name]
        first = [one for one in found if one["run"] == names[0]]
        seeds = [one["seed"] for one in own]
        first = [one for one in first if one["seed"] in seeds]
        judged = {}
        for store in stores:
            texts = _texts(own, store)
            lengths, beside = length_draws(texts), length_draws(_texts(first, store))
            of_seeds = [total_counts(_texts([one], store)).acceptance_length for one in own]
            judged[store] = {
                "acceptance_length": lengths[0],
                "interval": interval(lengths),
                "difference": lengths[0] - beside[0],
                "difference_interval": interval(lengths - beside),
                "conditional_acceptance_rate": total_counts(texts).conditional_acceptance_rate,
                "of_each_seed": dict(zip(map(str, seeds), of_seeds, strict=True)),
                "texts": len(own[0]["texts"][store]),
            }
        results.append({
            "run": name, "overrides": own[0]["overrides"], "steps": own[0]["steps"],
            "loss": [one["loss"] for one in own],
            "held_out": [one["held_out"] for one in own], "judged_on": judged,
        })  # fmt: skip
    return results


def _texts(runs: list[dict[str, Any]], store: str) -> list[Walked]:
    return [Walked.read(row) for run in runs for row in run["texts"][store]]


def print_sweep(content: dict[str, Any], console: Console | None = None) -> None:
    """Print a line a run."""
    k, first = content["num_assistant_tokens"], content["results"][0]["run"]
    table = Table(title=f"Walked acceptance length at K = {k}, and beside {first} (95%)")
    for name in ("run", "overrides"):
        table.add_column(name, overflow="fold")
    stores = list(content["judged_on"])
    for store in stores:
        table.add_column(store, justify="right")
        table.add_column(f"beside {first}", justify="right")
    for result in content["results"]:
        cells = [result["run"], " ".join(result["overrides"])]
        for store in stores:
            one = result["judged_on"][store]
            low, high = one["interval"]
            cells.append(f"{one['acceptance_length']:.3f} ({low:.2f} to {high:.2f})")
            low, high = one["difference_interval"]
            same = result["run"] == first
            cells.append("" if same else f"{one['difference']:+.3f} ({low:+.3f} to {high:+.3f})")
        table.add_row(*cells)
    (console or plain_console()).print(table)


@style.context("default")  # not what a matplotlibrc in the current folder says
def plot_sweep(content: dict[str, Any], path: Path) -> None:
    """Draw how far each run is from the first, with the interval of that, a panel a store."""
    results, stores = content["results"], list(content["judged_on"])
    figure = Figure(figsize=(5 * len(stores) + 1, 1.2 + 0.32 * len(results)), layout="constrained")
    panels = figure.subplots(1, len(stores), sharey=True, squeeze=False)[0]
    names = [result["run"] for result in results]
    for axes, store in zip(panels, stores, strict=True):
        judged = [result["judged_on"][store] for result in results]
        told = [one["difference"] for one in judged]
        intervals = [one["difference_interval"] for one in judged]
        errors = [
            [d - low for d, (low, _) in zip(told, intervals, strict=True)],
            [high - d for d, (_, high) in zip(told, intervals, strict=True)],
        ]
        axes.errorbar(told, range(len(names)), xerr=errors, fmt="o", markersize=4, capsize=2)
        axes.axvline(0, linewidth=0.8, linestyle=":")
        k, first = content["num_assistant_tokens"], judged[0]["acceptance_length"]
        axes.set_title(store, parse_math=False)  # names hold any character
        beside = f"acceptance length at K = {k} beside {names[0]}, {first:.3f}"
        axes.set_xlabel(beside, parse_math=False)
        axes.set_yticks(range(len(names)), names, parse_math=False)
        axes.grid(alpha=0.3, axis="x")
    panels[0].invert_yaxis()
    with whole_file(path) as work:
        figure.savefig(work, dpi=120)
