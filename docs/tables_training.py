"""Tables of what was trained: settings compared, mistakes, adaptations, data, releases."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from docs.tables import Results, interval, length, made_of, rows_of
from headstart.configs.loader import load_config
from headstart.configs.schema import DataConfig
from headstart.train.memory import (
    Launch,
    extraction_bytes,
    generation_bytes,
    held_target,
    peaks,
)
from headstart.train.plan import run_shapes


@made_of("reference")
def reference_validations(found: Results) -> str:
    run = found["reference"]
    points = [*run["validations"], {"step": 0} | run["best"]]
    steps = [f"{v['step']:,}" for v in run["validations"]]
    lengths = [f"{v['acceptance_length']:.2f}" for v in points]
    header = " | ".join(["step", *steps, "through the clusters"])
    return rows_of(header, [["acceptance length", *lengths]])


@made_of("bench-train")
def train_costs(found: Results) -> str:
    told = {
        "step_over_forward": "the head's step, per anchor / the target's forward with its LM head, "
        "per token",
        "plain_over_step": "full-vocabulary objective written plainly / the sparse one, seconds",
        "plain_over_step_memory": "the same, peak memory",
    }
    ratios = found["bench-train"]["ratios"]
    return rows_of("what (`key`) | ratio", [
        [f"{text} (`{name}`)", f"{ratios[name]:.2f}"] for name, text in told.items()
    ])  # fmt: skip


@made_of("objective-exact", "objective-sparse", "narrow-data", "narrow-svd")
def objectives(found: Results) -> str:
    told = {
        "objective-exact": "objective over the whole vocabulary",
        "objective-sparse": "sparse objective",
        "narrow-data": "width 256, data-aware start of the low-rank tie",
        "narrow-svd": "width 256, start from the plain SVD of the table",
    }
    return rows_of("head of 100 steps | simulated acceptance length", [
        [text, f"{found[name]['best']['acceptance_length']:.3f}"] for name, text in told.items()
    ])  # fmt: skip


@made_of("bench-tie")
def low_rank_tie(found: Results) -> str:
    same = found["bench-tie"]["same_best_token"]
    return rows_of("width | data-aware start keeps the best token | plain SVD", [
        [width, f"{kept:.1%}", f"{same['svd'][width]:.1%}"] for width, kept in same["data"].items()
    ])  # fmt: skip


@made_of("ordered", "ordered-256")
def recall(found: Results) -> str:
    shapes = [found[name]["after"] for name in ("ordered", "ordered-256")]
    rows: list[list[str]] = []
    for top in ("8", "16", "32", "64"):
        kinds = [
            f"{after['recall'][kind][top]:.3f}" for after in shapes for kind in ("argmax", "mass")
        ]
        rows.append([f"recall at {top} clusters", *kinds])
    for name, text in (("acceptance_length", "through them"), ("dense_acceptance_length", "dense")):
        cells = [cell for after in shapes for cell in (f"{after[name]:.3f}", "")]
        rows.append([f"simulated acceptance length, {text}", *cells])
    header = (
        "clusters read | 2,048 of 128: teacher's best token | its mass | 1,024 of 256: best token "
        "| its mass"
    )
    return rows_of(header, rows)


@made_of("ordered-mean", "ordered-learned")
def centroids(found: Results) -> str:
    rows = [["dense", f"{found['ordered-mean']['after']['dense_acceptance_length']:.3f}", ""]]
    for name, text in (("mean", "means of the clusters"), ("learned", "500 steps of learning")):
        after = found[f"ordered-{name}"]["after"]
        missed = f"{1 - after['recall']['argmax']['32']:.1%}"
        rows.append([text, f"{after['acceptance_length']:.3f}", missed])
    return rows_of("centroids | simulated acceptance length | best tokens missed", rows)


def beside_the_first(runs: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Each run of a sweep, and of each set of texts its acceptance length and the difference from
    the first run's, which itself has none."""
    for number, run in enumerate(runs):
        cells = []
        for one in run["eval_sets"].values():
            difference = interval(one["difference"], one["difference_interval"], "+.3f")
            cells += [f"{one['acceptance_length']:.3f}", difference if number else ""]
        yield run, cells


SWEPT = {
    "recipe": "100 steps of 8 conversations",
    "half-go-on": "half of the rows stop after the first round; 150 steps, the same time",
    "half-batches": "4 conversations a step; 200 steps, the same time",
    "both-halves": "both; 270 steps, the same time",
    "quarter-batches": "2 conversations a step, half of the rows stop; 440 steps",
    "quarter-go-on": "4 conversations a step, three quarters of the rows stop; 330 steps",
    "three-layers-same-time": "a third layer and `both-halves`; 220 steps",
    "learning-rate-2e-3": "twice the learning rate",
    "three-layers": "in place of two",
    "reached": "a draft counts only where all before it are the text's",
    "own_tokens": "the rounds read the head's own tokens",
    "cross_entropy": "on the target's best token, in place of KL",
    "lk_hybrid": "KL that turns into total variation",
    "total_variation": "in place of KL, from the start",
    "unroll-1": "the first round alone",
    "unroll-2": "two rounds",
    "unroll-5": "five rounds",
    "greedy-text": "trained on greedy text alone",
    "sampled-text": "on text sampled at 0.7 alone",
    "400-conversations": "of the 800 that are read",
    "100-conversations": "of the 800 that are read",
    "own-prose": "900 of the target's own texts from prose",
    "fixed-prose": "900 texts of others, of prose, equally long",
    "one-layer": "in place of two",
    "width-320": "half the width, low-rank tie",
    "unroll-3": "three rounds",
    "learning-rate-5e-4": "half the learning rate",
}
"""Run of the sweep -> what it changes."""


@made_of("sweep-recipe")
def sweep_recipe(found: Results) -> str:
    rows = []
    for run, cells in beside_the_first(found["sweep-recipe"]["results"]):
        rates = run["eval_sets"]["greedy"]["conditional_acceptance_rate"][:2]
        first = ", ".join(f"{rate:.2f}" for rate in rates)
        rows.append([f"`{run['run']}`", SWEPT[run["run"]], first, *cells])
    header = (
        "run | what | a_1, a_2 greedy | greedy | beside the first (95%) | sampled, T = 1 "
        "| beside the first (95%)"
    )
    return rows_of(header, rows)


@made_of("sweep-prose")
def sweep_prose(found: Results) -> str:
    told = {"fixed-prose": "prose of others", "own-prose": "the target's own answers to it"}
    runs = beside_the_first(found["sweep-prose"]["results"])
    rows = [[told[run["run"]], *cells] for run, cells in runs]
    header = (
        "trained on | greedy | beside the first (95%) | sampled, T = 1 | beside the first (95%)"
    )
    return rows_of(header, rows)


@made_of("sweep-spread")
def sweep_spread(found: Results) -> str:
    """The same number of rows a step, of few conversations or of many."""
    runs = beside_the_first(found["sweep-spread"]["results"])
    rows = [[run["run"], run["steps"], *cells] for run, cells in runs]
    header = "conversations of rows a step | steps | acceptance length | beside the first (95%)"
    return rows_of(header, rows)


QUICKSTART = {
    "base": "720 steps",
    "steps-1080": "1,080 steps",
    "reached": "a draft counts only where all before it are the text's",
    "lr-2e-3": "twice the learning rate",
}


@made_of("sweep-quickstart")
def sweep_quickstart(found: Results) -> str:
    """Changes to the quickstart, each judged at K = 4 on text of its kind and of others."""
    runs = {run["run"]: run for run in found["sweep-quickstart"]["results"]}
    at_four = [
        runs[name]
        | {"eval_sets": {k: v for k, v in runs[name]["eval_sets"].items() if k.endswith("K = 4")}}
        for name in QUICKSTART
    ]
    rows = [[QUICKSTART[run["run"]], *cells] for run, cells in beside_the_first(at_four)]
    header = " | ".join(
        f"{name} | beside the first (95%)"
        for name in ("`builtin:text_eval`", "`dev_vicuna_78`", "`dev_external_160`")
    )
    return rows_of(f"run | {header}", rows)


@made_of("paired-e034597")
def paired(found: Results) -> str:
    """Heads that an earlier commit and this code made from the same prompts and seed."""
    rows = []
    for one in found["paired-e034597"]["results"]:
        if one["category"] == "all":
            told, beside = "commit e034597", ""
            if one["difference"] is not None:
                told, beside = (
                    "now",
                    interval(one["difference"], one["difference_interval"], "+.3f"),
                )
            low, high = one["acceptance_length_interval"]
            rows.append([told, f"{one['acceptance_length']:.3f} ({low:.2f} to {high:.2f})", beside])
    return rows_of("trained by | simulated acceptance length (95%) | difference (95%)", rows)


@made_of("sweep-breadth")
def sweep_breadth(found: Results) -> str:
    """Each kind of text, by the head that was trained on all kinds and by one that never saw it."""
    everything, *others = found["sweep-breadth"]["results"]
    rows = []
    for run in others:
        kind = run["run"].removeprefix("without ")
        whole, without = (one["eval_sets"][kind] for one in (everything, run))
        gained = whole["acceptance_length"] - 1
        low, high = (1 + side / gained for side in without["difference_interval"])
        rows.append([
            kind, str(whole["texts"]), f"{whole['acceptance_length']:.3f}",
            f"{without['acceptance_length']:.3f}",
            f"{1 + without['difference'] / gained:.0%} ({low:.0%} to {high:.0%})",
        ])  # fmt: skip
    header = "kind | texts | trained on all kinds | never saw it | accepted drafts that stay (95%)"
    return rows_of(header, rows)


@made_of("sweep-rope")
def sweep_position(found: Results) -> str:
    told = {"newest": "0, the newest token", "one_earlier": "-1, one earlier", "both": "`mixed`"}
    runs = beside_the_first(found["sweep-rope"]["results"])
    rows = [[told[run["run"]], *cells] for run, cells in runs]
    header = (
        "`train.draft_position_offset` | judged at the newest token | beside the first (95%) "
        "| judged one earlier | beside the first (95%)"
    )
    return rows_of(header, rows)


MISTAKES = {
    "right": "none",
    "same_token": "`same_token`: the embedding of a token with the state of that very token",
    "pre_norm": "`pre_norm`: hidden states before the final norm",
    "own_key": "`own_key`: a row sees the key of its own token",
    "future_keys": "`future_keys`: a row sees the keys of the whole text",
    "top_clusters": "`top_clusters`: trained through the clusters that a draft reads",
    "no_soft_cap": "`no_soft_cap`: the teacher's logits before its soft cap",
}
"""Misalignment on purpose -> what it is."""


def mistake_table(found: Results) -> str:
    rows = [
        [MISTAKES[run["run"]], f"{run['loss'][0]:.2f}", *cells]
        for sweep in found.values()
        for run, cells in beside_the_first(sweep["results"])
    ]
    header = (
        "mistake | loss in the end | greedy | beside none (95%) | sampled, T = 1 "
        "| beside none (95%)"
    )
    return rows_of(header, rows)


@made_of("sweep-traps")
def mistakes(found: Results) -> str:
    return mistake_table(found)


@made_of("sweep-traps-clusters")
def mistake_clusters(found: Results) -> str:
    return mistake_table(found)


@made_of("sweep-soft-cap")
def mistake_soft_cap(found: Results) -> str:
    return mistake_table(found)


@made_of("adapt-*")
def adapted(found: Results) -> str:
    header = (
        "tuned target, adaptation | base head on the base target | on the tuned one | adapted "
        "| recovered | general prompts | speedup before | after"
    )
    return rows_of(header, [_adapted(name.removeprefix("adapt-"), r) for name, r in found.items()])


def _adapted(name: str, r: dict[str, Any]) -> list[str]:
    if r["adapted_acceptance_length"] is None:  # measured alone
        lost = [f"{r[f'{stage}_acceptance_length']:.2f}" for stage in ("reference", "unadapted")]
        return [name, *lost, "", "", "", "", ""]
    texts, cells = r["acceptance"]["domain"], [name]
    for stage in ("reference", "unadapted", "adapted"):
        both = (texts[stage][f"acceptance_length{end}"] for end in ("", "_without_loops"))
        cells.append("{:.2f} ({:.2f})".format(*both))
    recovered, straight = r["recovered_share"], r["recovered_share_without_loops"]
    cells.append("" if recovered is None else f"{recovered:.0%} ({straight:.0%})")
    change = r["general_change_share"]
    cells.append("" if change is None else f"{change:+.0%}")
    if r["speedup"] is None:  # nothing was decoded
        return [*cells, "", ""]
    speeds = r["speedup"]["domain"]
    return [*cells, *(f"{speeds[stage]['speedup']:.2f}" for stage in ("unadapted", "adapted"))]


@made_of("bench-extract", "bench-regenerate")
def data_costs(found: Results) -> str:
    told = {
        "extract_over_forward": "extraction to disk / the bare forward with its LM head over the "
        "same tokens",
        "fused_over_regenerate": "`extract` without conversations / `regenerate`",
        "batched_over_single": "`regenerate` in batches of 64 / `generate` one by one, tokens per "
        "second",
    }
    ratios = {
        name: value for content in found.values() for name, value in content["ratios"].items()
    }
    return rows_of("ratio (`key`) | measured", [
        [f"{text} (`{name}`)", f"{ratios[name]:.2f}"] for name, text in told.items()
    ])  # fmt: skip


@made_of("bench-extract")
def stepwise(found: Results) -> str:
    figures = found["bench-extract"]["stepwise"]
    return rows_of("of | difference", [[what, f"{value:.3g}"] for what, value in figures.items()])


KINDS = {
    "assistant": "`assistant`, one layer",
    "parallel": "`parallel`, 8 stacks",
    "mtp": "`mtp`",
    "eagle": "`eagle`",
    "assistant-two-layers": "`assistant`, two layers, as recipes have it",
    "mtp-one": "`mtp`, trained for one draft",
    "mtp-three": "`mtp`, trained for three",
}
"""Run of the sweep over kinds of heads -> what it is."""
OF_KINDS = "greedy, K = {}"


@made_of("sweep-kinds")
def kinds_compared(found: Results) -> str:
    rows: list[list[str]] = []
    for run in found["sweep-kinds"]["results"]:
        sets = run["eval_sets"]
        three = sets[OF_KINDS.format(3)]
        shortest, longest = (sets[OF_KINDS.format(k)]["acceptance_length"] for k in (1, 8))
        beside = interval(three["difference"], three["difference_interval"], "+.2f")
        seeds = ", ".join(f"{value:.2f}" for value in three["of_each_seed"].values())
        rows.append([
            KINDS[run["run"]], f"{run['parameters'][0] / 1e6:.1f} M", f"{shortest:.2f}",
            interval(three["acceptance_length"], three["interval"]), seeds,
            beside if rows else "", f"{longest:.2f}",
        ])  # fmt: skip
    header = "head | trained | K = 1 | K = 3 (95%) | its seeds | beside the first (95%) | K = 8"
    return rows_of(header, rows)


@made_of("sweep-kinds")
def kinds_by_draft(found: Results) -> str:
    """a_1 .. a_8 in rounds of 8, and what training took."""
    rows = []
    for run in found["sweep-kinds"]["results"]:
        rates = run["eval_sets"][OF_KINDS.format(8)]["conditional_acceptance_rate"]
        minutes = ", ".join(f"{minute:.1f}" for minute in run["minutes"])
        rows.append([KINDS[run["run"]], *(f"{rate:.2f}" for rate in rates), minutes])
    header = " | ".join(["head", *(f"a_{k}" for k in range(1, 9)), "minutes, each seed"])
    return rows_of(header, rows)


@made_of("eval-kinds", "eval-kinds-ordered")
def kinds_decoded(found: Results) -> str:
    """Decoded by the clean-KV decoder: what a draft costs, and what is left of it."""
    pairs = [(report, r) for report in found.values() for r in report["results"]]
    rows = []
    for report, r in pairs:
        if (r["category"], r["looping_texts"]) != ("all", "with"):
            continue
        folder = Path(r["head"])
        ordered = folder.parent.name == "ordered"
        run = folder.name if ordered else folder.parent.name.partition("-seed")[0]
        cost = report["costs"][r["head"]]["exact"]
        rows.append([
            KINDS[run] + (", through clusters" if ordered else ""), length(r), f"{cost['c']:.3f}",
            f"{cost['v'][3]:.2f}", interval(r["speedup"], r["speedup_interval"]),
        ])  # fmt: skip
    header = (
        "head | acceptance length (95%) | a draft, in steps of the target | verifying three "
        "| speedup (95%)"
    )
    return rows_of(header, rows)


@made_of("rival-speculators")
def rival(found: Results) -> str:
    r = found["rival-speculators"]
    rows = [
        [k, interval(r["results"][k]["acceptance_length"], r["results"][k]["interval"])]
        for k in ("1", "3", "8")
    ]
    rates = (r["results"]["8"]["conditional_acceptance_rate"], r["accuracy_over_all_places"])
    header = "draft tokens K | simulated acceptance length (95%)"
    table = rows_of(header, rows)
    names = ("a_k over rounds, as Headstart counts", "over all places, as speculators does")
    shares = [
        [name, *(f"{a:.2f}" for a in own[:4])] for name, own in zip(names, rates, strict=True)
    ]
    return f"{table}\n\n" + rows_of("share of drafts that are right | 1 | 2 | 3 | 4", shares)


@made_of("order-kinds-*")
def kinds_ordered(found: Results) -> str:
    rows = []
    for name, r in found.items():
        after, kind = r["after"], name.removeprefix("order-kinds-")
        lengths = (f"{after[key]:.3f}" for key in ("dense_acceptance_length", "acceptance_length"))
        rows.append([KINDS[kind], *lengths, f"{after['recall']['argmax']['32']:.1%}"])
    header = (
        "head | acceptance length, the whole table | through the clusters "
        "| best tokens within those read"
    )
    return rows_of(header, rows)


@made_of("storage-target", "storage-int8")
def storage(found: Results) -> str:
    return rows_of("`data.storage` | acceptance length", [
        [f"`{name.removeprefix('storage-')}`", f"{r['results'][0]['acceptance_length']:.2f}"]
        for name, r in found.items()
    ])  # fmt: skip


@made_of("versions")
def versions(found: Results) -> str:
    names = ("transformers", "python", "torch", "selected", "order", "passed", "failed")
    header = "transformers | Python | torch | selected | order | passed | failed | which failed"
    rows = []
    for run in found["versions"]:
        tests = (re.sub(r".*::|\[.*", "", failure) for failure in run["failures"])
        rows.append([*(run[name] for name in names), ", ".join(f"`{test}`" for test in tests)])
    return rows_of(header, rows)


@made_of("releases")
def releases(found: Results) -> str:
    results = [r for r in found["releases"]["results"] if r["category"] == "all"]
    rows = []
    for r in results:
        difference = r["difference"]
        beside = "" if difference is None else interval(difference, r["difference_interval"], ".3f")
        release = r["head"].removeprefix("quickstart-").removesuffix("/head")
        rows.append([release, length(r), beside])
    return rows_of("trained on transformers | simulated acceptance length (95%) | difference", rows)


@made_of("memory", "gpu-generation")
def memory_checked(found: Results) -> str:
    """The plan's peaks, and what the program's own functions hold over tensors without data; last
    what was measured on a GPU."""
    rows = []
    for name, counted in found["memory"]["peak_bytes"].items():
        told = [f"target.name=google/{name}-it", *found["memory"]["settings"]]
        config = load_config(None, told)
        shapes = run_shapes(config)
        weights = held_target(shapes.target, 2, Launch(), sharded=False)
        said = dict(peaks(config, shapes, Launch()))
        said["extracting"] = weights + extraction_bytes(shapes.text, config.data, 2)
        pairs = [(said[phase], counted[phase]) for phase in ("answering", "extracting", "training")]
        worst = max(abs(plan / fake - 1) for plan, fake in pairs)
        beside = max(abs((p - weights) / (f - counted["weights"]) - 1) for p, f in pairs)
        cells = [f"{gib(plan)}, {gib(fake)}" for plan, fake in pairs]
        rows.append([name.removeprefix("gemma-4-"), *cells, f"{worst:.1%}", f"{beside:.1%}"])
    measured = found["gpu-generation"]["found"]
    shapes = run_shapes(load_config(None, ["target.name=google/gemma-4-E4B-it"]))
    asked = DataConfig(
        max_prompt_tokens=measured["prompt_tokens"],
        max_new_tokens=measured["new_tokens"],
        generation_batch_size=measured["batch"],
    )
    weights = held_target(shapes.target, 2, Launch(), sharded=False)
    plan = weights + generation_bytes(shapes.text, asked, 2, recorded=False)
    seen = measured["cudnn off"]["peak_bytes"]
    beside = abs((plan - weights) / (seen - weights) - 1)
    what = (
        f"E4B, {measured['batch']} prompts of {measured['prompt_tokens']} tokens, not recorded: "
        "plan, and one H100 measured"
    )
    cells = [f"{gib(plan)}, {gib(seen)}", "", ""]
    rows.append([what, *cells, f"{abs(plan / seen - 1):.1%}", f"{beside:.1%}"])
    header = (
        "target, each GiB | answering: plan, counted | extracting | training | largest difference "
        "| without the weights"
    )
    return rows_of(header, rows)


def gib(count: float) -> str:
    return f"{count / 2**30:.2f}"
