"""Train runs that differ in some settings and compare their heads on the same stored texts.

    python examples/ablations/sweep.py --config examples/ablations/sweep-recipe.yaml

Acceptance is computed as `headstart simulate` computes it, without decoding, so that no
clock is in what is compared. The same command goes on where it stopped. The file has these keys:
`config`, the recipe that all runs vary, by name or path; `overrides` of every run; `runs`, name ->
overrides, or `{overrides: [...], seeds: [0]}` for a run with fewer seeds, the first of which the
others are compared with; `eval_sets`, name -> an activation store of texts that no run trains on,
or `{store: DIR, draft_position_offset: -1}`; and, with the defaults below, `seeds` and
`num_assistant_tokens`, one K or a list. `{kind}` in the path of a store stands for the kind of the
run's head, which may read what others do not.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from rich.table import Table

from headstart.cli.arguments import default_device
from headstart.common.console import plain_console, print_once
from headstart.common.files import write_atomically
from headstart.common.machine import environment
from headstart.configs.loader import dump_config, load_config
from headstart.configs.schema import Config
from headstart.data.conversations import stable_hash
from headstart.data.store import ActivationStore
from headstart.eval.recorded import set_names, without_paths
from headstart.eval.replay import ReplayedText, length_draws, replay_texts, total_counts
from headstart.eval.statistics import interval
from headstart.heads.kinds import kind_of
from headstart.heads.loading import open_target
from headstart.heads.saving import load_assistant
from headstart.heads.target import Target
from headstart.heads.unroll import DraftHead
from headstart.train.checkpoints import checkpoints
from headstart.train.run import train
from headstart.train.run_folder import read_metrics

AT = ", K = "
"""Between the name of a set of texts and K, where several are asked for."""


def run_sweep(path: Path, out: Path, overrides: list[str]) -> dict[str, Any]:
    """Train and judge every run, and write `out`/sweep.json and sweep.png after each."""
    sweep: dict[str, Any] = {"overrides": [], "seeds": [0], "num_assistant_tokens": 4}
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    if wrong := given.keys() - sweep.keys() ^ {"config", "runs", "eval_sets"}:
        raise SystemExit(f"{path}: a key is missing or unknown: {', '.join(sorted(wrong))}")
    sweep |= given
    for name, on in sweep["eval_sets"].items():
        on = on if isinstance(on, dict) else {"store": on}
        sweep["eval_sets"][name] = {"draft_position_offset": 0} | on
        if sweep["eval_sets"][name]["draft_position_offset"] not in (0, -1):
            raise SystemExit(f"{path}: draft_position_offset of {name} is to be 0 or -1")
    chosen = {
        name: own if isinstance(own, dict) else {"overrides": own}
        for name, own in sweep["runs"].items()
    }
    runs = [  # all are loaded before anything runs
        (name, load_config(sweep["config"], [
            *sweep["overrides"], *overrides, *own["overrides"],
            ("seed", seed), ("output_dir", out / f"{name}-seed{seed}"),
        ]))
        for seed in sweep["seeds"] for name, own in chosen.items()
        if seed in own.get("seeds", sweep["seeds"])
    ]  # fmt: skip
    if isinstance(sweep["num_assistant_tokens"], int):
        sweep["num_assistant_tokens"] = [sweep["num_assistant_tokens"]]
    target = open_target(runs[0][1].target, default_device())
    found: list[dict[str, Any]] = []
    for number, (name, config) in enumerate(runs, start=1):
        print_once(f"Run {number} of {len(runs)}: {name}, seed {config.seed}")
        judged = train_and_evaluate(config, target, sweep)
        found.append({"run": name, "overrides": chosen[name]["overrides"], **judged})
        machine = environment(target.device) | {"target": target.name}
        content: dict[str, Any] = {"sweep": 2, "environment": machine, **sweep}
        del content["runs"]
        content["results"] = summarize(found)
        content = without_paths(content, set_names(config))
        write_atomically(out / "sweep.json", json.dumps(content, indent=2) + "\n")
        draw = plot if len(sweep["num_assistant_tokens"]) == 1 else plot_lengths
        draw(content["results"], out / "sweep.png")
    print_table(content["results"])
    return content


def train_and_evaluate(config: Config, target: Target, sweep: dict[str, Any]) -> dict[str, Any]:
    """What judged.json in the run's folder holds: the counts of each text."""
    eval_sets, lengths = sweep["eval_sets"], sweep["num_assistant_tokens"]
    asked = stable_hash(dump_config(config))
    settings = {"config": asked, "eval_sets": eval_sets, "num_assistant_tokens": lengths}
    path = config.output_dir / "judged.json"
    if path.is_file():
        judged: dict[str, Any] = read_json(path)
        if judged["settings"] == settings:
            return judged
    train(config, resume=True)  # refuses a folder that holds a run of other settings
    head = DraftHead(load_assistant(config.output_dir / "head", target.table.dtype, target.device))
    kind = kind_of(head.assistant.config).name
    stores = {
        name: ActivationStore(Path(on["store"].format(kind=kind)), target, head.inputs)
        for name, on in eval_sets.items()
    }
    positions = {name: on["draft_position_offset"] for name, on in eval_sets.items()}
    texts = replay_texts(head, target, stores, lengths, "Judging", positions)
    rows = read_metrics(config.output_dir)
    judged = {
        "seed": config.seed,
        "steps": config.train.max_steps,
        "loss": rows[-1]["loss"],
        "held_out": max(row.get("acceptance_length", 0.0) for row in rows),
        "parameters": read_json(config.output_dir / "summary.json")["parameters_trained"],
        "minutes": minutes_of_training(config.output_dir),
        "texts": {
            name if len(lengths) == 1 else f"{name}{AT}{k}": [text.row() for text in replayed]
            for name, of_lengths in texts.items()
            for k, replayed in of_lengths.items()
        },
        "settings": settings,
    }
    write_atomically(path, json.dumps(judged) + "\n")
    return judged


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def minutes_of_training(run: Path) -> float:
    """Of all its steps, also of a run that was resumed."""
    newest = checkpoints(run / "checkpoints")[-1]
    return float(read_json(newest / "state.json")["seconds"]) / 60


def summarize(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One result a run, its seeds together, beside the first run on the same texts and seeds.

    Intervals are of 95%, over other texts; that of a difference draws the same texts for both.
    """
    results = []
    for name in dict.fromkeys(one["run"] for one in found):
        runs = [one for one in found if one["run"] == name]
        seeds = [one["seed"] for one in runs]
        first = [one for one in found if one["run"] == found[0]["run"] and one["seed"] in seeds]
        judged = {}
        for store in runs[0]["texts"]:
            texts, beside = texts_of(runs, store), texts_of(first, store)
            lengths, base = length_draws(texts), length_draws(beside)
            judged[store] = {
                "acceptance_length": lengths[0],
                "interval": interval(lengths),
                "difference": lengths[0] - base[0],
                "difference_interval": interval(lengths - base),
                "conditional_acceptance_rate": total_counts(texts).conditional_acceptance_rate,
                "of_each_seed": {
                    str(one["seed"]): total_counts(texts_of([one], store)).acceptance_length
                    for one in runs
                },
                "texts": len(runs[0]["texts"][store]),
            }
        each = ("loss", "held_out", "parameters", "minutes")
        columns = {key: [one[key] for one in runs] for key in each}
        results.append({
            "run": name, "overrides": runs[0]["overrides"], "steps": runs[0]["steps"], **columns,
            "eval_sets": judged,
        })  # fmt: skip
    return results


def texts_of(runs: list[dict[str, Any]], store: str) -> list[ReplayedText]:
    return [ReplayedText.read(row) for run in runs for row in run["texts"][store]]


def print_table(results: list[dict[str, Any]]) -> None:
    for store in results[0]["eval_sets"]:
        table = Table("run", "acceptance length (95%)", "beside the first run (95%)", title=store)
        for result in results:
            one = result["eval_sets"][store]
            (low, high), (least, most) = one["interval"], one["difference_interval"]
            table.add_row(
                result["run"],
                f"{one['acceptance_length']:.3f} ({low:.2f} to {high:.2f})",
                f"{one['difference']:+.3f} ({least:+.3f} to {most:+.3f})",
            )
        plain_console().print(table)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw the difference of each run from the first with its interval, a panel a store."""
    stores, names = list(results[0]["eval_sets"]), [result["run"] for result in results]
    figure = Figure(figsize=(5 * len(stores) + 1, 1.2 + 0.32 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(stores), sharey=True, squeeze=False)[0]
    for axes, store in zip(panels, stores, strict=True):
        for place, result in enumerate(results):
            one = result["eval_sets"][store]
            axes.plot(one["difference_interval"], [place, place], color="C0")
            axes.plot(one["difference"], place, "o", markersize=4, color="C0")
        axes.axvline(0, linewidth=0.8, linestyle=":")
        axes.set_title(store)
        axes.set_xlabel(f"acceptance length beside {names[0]}")
        axes.set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=120)


def plot_lengths(results: list[dict[str, Any]], path: Path) -> None:
    """Draw the acceptance length of each run by K with its interval, a panel a store."""
    stores = list(dict.fromkeys(name.partition(AT)[0] for name in results[0]["eval_sets"]))
    figure = Figure(figsize=(6 * len(stores) + 2.5, 5), layout="constrained")
    panels = figure.subplots(1, len(stores), sharey=True, squeeze=False)[0]
    for axes, store in zip(panels, stores, strict=True):
        for result in results:
            at = {
                int(name.rpartition(AT)[2]): one
                for name, one in result["eval_sets"].items() if name.startswith(store + AT)
            }  # fmt: skip
            lengths = [one["acceptance_length"] for one in at.values()]
            [line] = axes.plot(list(at), lengths, "o-", markersize=3, label=result["run"])
            low, high = zip(*(one["interval"] for one in at.values()), strict=True)
            axes.fill_between(list(at), low, high, color=line.get_color(), alpha=0.12, linewidth=0)
        axes.set_title(store)
        axes.set_xlabel("draft tokens K")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("acceptance length")
    panels[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", type=Path, required=True, metavar="SWEEP.yaml")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/NAME of the YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every run")
    args = parser.parse_args()
    run_sweep(args.config, args.out or Path("runs") / args.config.stem, args.overrides)
