"""`headstart sweep`: train runs that differ in some settings, and judge them on the same texts.

Heads are judged by walking rounds over stored texts, as `headstart eval --simulate` does: without
decoding, so that what is compared is acceptance and no clock.

Letters: K draft tokens a round.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from headstart.configs.loader import dump_config
from headstart.configs.schema import Config
from headstart.configs.sweep import Sweep
from headstart.data.progress import progress_bar
from headstart.data.store import ActivationStore
from headstart.eval.acceptance import AcceptanceCounts
from headstart.eval.environment import environment
from headstart.eval.simulate import simulate_acceptance
from headstart.eval.statistics import resampled
from headstart.heads.assistant import load_assistant
from headstart.heads.files import write_atomically
from headstart.heads.targets import Target, open_target
from headstart.heads.unroll import DraftHead
from headstart.train.loop import train
from headstart.train.run_folder import read_metrics

JUDGED = "judged.json"  # in a run's folder: what became of it


def run_sweep(
    sweep: Sweep, out: Path, overrides: list[str], device: torch.device | str
) -> dict[str, Any]:
    """Train and judge the runs of a sweep, and write `out`/sweep.json and sweep.png.

    A run that was judged stays as it is; one that was cut short goes on from its checkpoint. The
    files are written anew after each run.

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
    stores = {name: ActivationStore(path, target) for name, path in sweep.judged_on.items()}
    for _, config in runs:
        _check_same(config)
    found: list[dict[str, Any]] = []
    content: dict[str, Any] = {}
    for number, (name, config) in enumerate(runs, start=1):
        if not (config.run.dir / JUDGED).is_file():
            print(f"Run {number} of {len(runs)}: {name}, seed {config.run.seed}", flush=True)
            train(config, resume=True)
            _judge(config, target, stores, sweep.num_assistant_tokens)
        judged = json.loads((config.run.dir / JUDGED).read_text(encoding="utf-8"))
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
    path = config.run.dir / JUDGED
    if path.is_file():
        earlier = json.loads(path.read_text(encoding="utf-8"))["config"]
        # Settings that are newer than the run had their defaults.
        if dump_config(Config.model_validate(yaml.safe_load(earlier))) != dump_config(config):
            raise ValueError(
                f"{config.run.dir} was judged with other settings: name another folder, --out DIR, "
                "or delete it"
            )


def _judge(config: Config, target: Target, stores: dict[str, ActivationStore], k: int) -> None:
    """Walk rounds over every text of the stores, and keep the counts of each."""
    folder = config.run.dir
    head = DraftHead(load_assistant(folder / "head", target.table.dtype, target.device))
    texts: dict[str, list[dict[str, Any]]] = {}
    with progress_bar() as bar:
        total = sum(len(store.entries) for store in stores.values())
        task = bar.add_task("Judging", total=total, status="texts")
        for name, store in stores.items():
            texts[name] = []
            for i, entry in enumerate(store.entries):
                counts = simulate_acceptance(head, target, store, k, [i]).acceptance
                if counts.rounds:
                    texts[name].append({"id": entry.id} | asdict(counts))
                bar.update(task, advance=1)
    rows = read_metrics(folder)
    judged = {
        "seed": config.run.seed,
        "steps": config.train.steps,
        "loss": rows[-1]["loss"],
        "held_out": max(row.get("acceptance_length", 0.0) for row in rows),
        "texts": texts,
        "config": dump_config(config),
    }
    write_atomically(folder / JUDGED, json.dumps(judged) + "\n")


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
            lengths, beside = _lengths(own, store), _lengths(first, store)
            counts = [_counts(one, store) for one in own]
            whole = sum(counts[1:], counts[0])
            of_seeds = [one.acceptance_length for one in counts]
            judged[store] = {
                "acceptance_length": lengths[0],
                "interval": _interval(lengths),
                "difference": lengths[0] - beside[0],
                "difference_interval": _interval(lengths - beside),
                "conditional_acceptance_rate": whole.conditional_acceptance_rate,
                "of_each_seed": dict(zip(map(str, seeds), of_seeds, strict=True)),
                "texts": len(own[0]["texts"][store]),
            }
        results.append({
            "run": name, "overrides": own[0]["overrides"], "steps": own[0]["steps"],
            "loss": [one["loss"] for one in own],
            "held_out": [one["held_out"] for one in own], "judged_on": judged,
        })  # fmt: skip
    return results


def _lengths(runs: list[dict[str, Any]], store: str) -> np.ndarray:
    """[1 + S] acceptance length over all seeds: as it is, then over texts drawn anew."""
    texts = [text for run in runs for text in run["texts"][store]]
    ids = [text["id"] for text in texts]
    sums = resampled(ids, [[text["rounds"], sum(text["accepted"])] for text in texts])
    lengths: np.ndarray = 1 + sums[:, 1] / sums[:, 0]
    return lengths


def _interval(values: np.ndarray) -> list[float]:
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return [float(low), float(high)]


def _counts(run: dict[str, Any], store: str) -> AcceptanceCounts:
    parts = []
    for text in run["texts"][store]:
        reached, accepted = tuple(text["reached"]), tuple(text["accepted"])
        parts.append(AcceptanceCounts(text["rounds"], text["drafted"], reached, accepted))
    return sum(parts[1:], parts[0])


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
    (console or Console()).print(table)


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
        axes.set(title=store, xlabel=f"acceptance length at K = {k} beside {names[0]}, {first:.3f}")
        axes.set_yticks(range(len(names)), names)
        axes.grid(alpha=0.3, axis="x")
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=120)
