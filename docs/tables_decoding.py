"""Tables of what was decoded: acceptance, speedups, what drafts cost, engines, one GPU."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from docs.tables import Results, interval, length, made_of, rows_of
from headstart.eval import page, statistics
from headstart.eval.compare import MEASURES, compare
from headstart.eval.statistics import resampled, sampling_name

NAMES = {
    "transformers": "stock (`transformers`)",
    "exact": "clean-KV (`exact`)",
    "cost": "cost rule (`cost`)",
    "hybrid": "hybrid (`hybrid`)",
    "lookup": "prompt lookup (`lookup`)",
}
"""Decoder -> what a table calls it."""


def name_of(r: dict[str, Any]) -> str:
    """The decoder of a result, and of a sampled one how."""
    return NAMES[r["decoder"]] + (f", sampled: {sampling_name(r)}" if r["temperature"] else "")


def speedup(r: dict[str, Any]) -> str:
    return interval(r["speedup"], r["speedup_interval"])


def difference(before: Any, after: Any, decoders: tuple[str, str]) -> str:
    """Of the greedy acceptance lengths of two decoders, texts paired, as `headstart compare` has
    it."""
    greedy = [report | {"results": whole(report)} for report in (before, after)]
    changes = compare(greedy[0], greedy[1], decoders)
    found = next(c for c in changes if (c.category, c.measure) == ("all", "acceptance length"))
    return interval(found.after - found.before, found.interval, "+.3f")


def equal(r: dict[str, Any]) -> str:
    """Of greedy texts; sampled ones need not be."""
    if r["equal_to_plain"] is None:
        return ""
    return "all" if r["equal_to_plain"] else f"{1 - r['diverged_share']:.0%}"


def whole(
    report: dict[str, Any], category: str = "all", sampled: bool = False
) -> list[dict[str, Any]]:
    """The greedy, or the sampled, results of a report over all texts of a category, those that loop
    too."""
    chosen = (r for r in report["results"] if bool(r["temperature"]) == sampled)
    return [r for r in chosen if r["category"] == category and r["looping_texts"] == "with"]


def _with_and_without_loops(report: dict[str, Any]) -> Iterator[tuple[dict[str, Any], list[str]]]:
    for r in report["results"]:
        if r["category"] == "all":
            group = {"with": "all", "without": "no loops"}[r["looping_texts"]]
            yield r, [name_of(r), str(r["num_assistant_tokens"]), group, str(r["prompts"])]


DECODERS = (
    "decoder | K | texts | prompts | acceptance length (95%) | speedup (95%) | without the prefill "
    "| predicted | texts equal to plain ones"
)


def decoder_table(report: dict[str, Any]) -> str:
    return rows_of(DECODERS, [
        [*side, length(r), speedup(r), f"{r['decode_speedup']:.2f}",
         f"{r['predicted_decode_speedup']:.2f}", equal(r)]
        for r, side in _with_and_without_loops(report)
    ])  # fmt: skip


def category_table(report: dict[str, Any], lengths: Sequence[str]) -> str:
    """Acceptance length of some decoders and speedup of all, by category; greedy."""
    shown = [r["decoder"] for r in whole(report)]
    header = ["category", *(f"length, `{d}`" for d in lengths), *(f"speedup, `{d}`" for d in shown)]
    rows = []
    for category in sorted({r["category"] for r in report["results"]} - {"all"}):
        of = {r["decoder"]: r for r in whole(report, category)}
        cells = [f"{of[d]['acceptance_length']:.2f}" for d in lengths]
        rows.append([category, *cells, *(f"{of[d]['speedup']:.2f}" for d in shown)])
    return rows_of(" | ".join(header), rows)


@made_of("eval-64", "eval-64-sampled")
def headline(found: Results) -> str:
    """What a README shows: five greedy rows, and below them the sampled ones, which have a plain
    decoding of their own."""
    results = {r["decoder"]: r for r in whole(found["eval-64"])}
    drawn = whole(found["eval-64-sampled"], sampled=True)
    shown = [results[decoder] for decoder in ("lookup", "transformers", "exact", "hybrid")]
    rows: list[list[str]] = []
    for way in dict.fromkeys(sampling_name(r) for r in [*shown, *drawn]):
        own = [r for r in [*shown, *drawn] if sampling_name(r) == way]
        plain = f"plain decoding, sampled: {way}" if own[0]["temperature"] else "plain decoding"
        rows.append([plain, "1", f"{own[0]['baseline_tokens_per_second']:.0f}", "1"])
        rows += [
            [f"{name_of(r)}, K = {r['num_assistant_tokens']}", length(r),
             f"{r['tokens_per_second']:.0f}", speedup(r)] for r in own
        ]  # fmt: skip
    header = "decoder | acceptance length (95%) | tokens per second | speedup (95%)"
    return rows_of(header, rows)


@made_of("overlap")
def overlap(found: Results) -> str:
    """Evaluation prompts that one training prompt holds large parts of, counted."""
    found = found["overlap"]
    rows = [
        [f"`{row['evaluation']}`" if "evaluation" in row else "the reference head's",
         ", ".join(f"`{name}`" for name in row["training"]), row["prompts"], row["from_70"],
         row["from_30_to_70"]]
        for row in [*found["sets"], found["report"]]
    ]  # fmt: skip
    header = "evaluation prompts | training prompts | number | sharing 70% and more | 30% to 70%"
    return rows_of(header, rows)


def measured(report: dict[str, Any], r: dict[str, Any], ids: Collection[str]) -> dict[str, Any]:
    """What `length` and `speedup` read, of some prompts of a result."""
    rows = [dict(zip(report["per_text_columns"], row, strict=True)) for row in r["per_text"]]
    rows = [row for row in rows if row["id"] in ids]
    names = [row["id"] for row in rows]
    columns = ("rounds", "accepted", "tokens", "seconds", "plain_tokens", "plain_seconds")
    sums = {column: resampled(names, [row[column] for row in rows]) for column in columns}
    found: dict[str, Any] = {}
    for key, name in (("acceptance_length", "acceptance length"), ("speedup", "speedup")):
        values = MEASURES[name](sums)
        found |= {key: float(values[0]), f"{key}_interval": statistics.interval(values)}
    return found


@made_of("eval-64", "overlap")
def headline_overlap(found: Results) -> str:
    """The headline's rows over all prompts, and over those that no training prompt is like."""
    report, shares = found["eval-64"], found["overlap"]["report"]["shares"]
    results = {r["decoder"]: r for r in whole(report)}
    rows = []
    for below, told in ((2.0, "all"), (0.7, "below 70%"), (0.3, "below 30%")):
        ids = [name for name, share in shares.items() if share < below]
        rows.append(["plain decoding", told, len(ids), "1", "1"])
        for decoder in ("lookup", "transformers", "exact", "hybrid"):
            r = results[decoder]
            own = measured(report, r, ids)
            name = f"{NAMES[decoder]}, K = {r['num_assistant_tokens']}"
            rows.append([name, told, len(ids), length(own), speedup(own)])
    header = "decoder | share of a training prompt | prompts | acceptance length (95%) | "
    return rows_of(f"{header}speedup (95%)", rows)


@made_of("eval-64")
def eval_64(found: Results) -> str:
    return decoder_table(found["eval-64"])


@made_of("eval-64")
def eval_64_rates(found: Results) -> str:
    return rows_of("decoder | a_1 .. a_K, all texts", [
        [NAMES[r["decoder"]], ", ".join(f"{a:.2f}" for a in r["conditional_acceptance_rate"])]
        for r in whole(found["eval-64"])
    ])  # fmt: skip


@made_of("eval-64")
def eval_64_categories(found: Results) -> str:
    return category_table(found["eval-64"], ("transformers", "exact", "hybrid", "lookup"))


@made_of("eval-k")
def eval_k(found: Results) -> str:
    return decoder_table(found["eval-k"])


@made_of("eval-300")
def eval_300(found: Results) -> str:
    return decoder_table(found["eval-300"])


@made_of("eval-300")
def eval_300_categories(found: Results) -> str:
    return category_table(found["eval-300"], ("transformers", "exact"))


@made_of("quickstart")
def quickstart(found: Results) -> str:
    return decoder_table(found["quickstart"])


@made_of("quickstart-simulated-*")
def development(found: Results) -> str:
    """Of each set of prompts and K, the head before it and the quickstart's."""
    rows = []
    for report in found.values():
        of_all = [r for r in report["results"] if r["category"] == "all"]
        before, now = (
            {r["num_assistant_tokens"]: r for r in of_all if r["head"] == head}
            for head in dict.fromkeys(r["head"] for r in of_all)
        )
        for k, r in now.items():
            beside = interval(r["difference"], r["difference_interval"], "+.3f")
            rows.append([
                f"`{report['environment']['store']}`", k, length(before[k]), length(r), beside
            ])  # fmt: skip
    header = "prompts | K | the head before it | acceptance length, simulated (95%) | difference"
    return rows_of(header, rows)


@made_of("quickstart-phases", "quickstart-first-figures")
def quickstart_phases(found: Results) -> str:
    """What `headstart train` has said that it would take, and what it took."""
    rows = [
        [phase["name"], phase["size"], *(f"{phase[key] / 60:.1f}" for key in ("seconds", "took"))]
        for phase in found["quickstart-phases"]
    ]
    return rows_of("phase | what | minutes expected | minutes taken", rows)


@made_of("eval-t1")
def eval_t1(found: Results) -> str:
    return rows_of("decoder | K | prompts | acceptance length (95%) | speedup (95%)", [
        [name_of(r), r["num_assistant_tokens"], r["prompts"], length(r), speedup(r)]
        for r in whole(found["eval-t1"], sampled=True)
    ])  # fmt: skip


@made_of("reference-simulated-*", "earlier-simulated-*")
def reference_simulated(found: Results) -> str:
    """Of each set of prompts and K, beside the reference head before it where that was measured."""
    rows = []
    for name, report in found.items():
        if name.startswith("earlier"):
            continue
        earlier = found.get(name.replace("reference", "earlier"), {"results": []})
        before, now = (
            {r["num_assistant_tokens"]: r for r in one["results"] if r["category"] == "all"}
            for one in (earlier, report)
        )
        for k, r in now.items():
            was = length(before[k]) if k in before else ""
            rows.append([f"`{report['environment']['store']}`", k, r["rounds"], length(r), was])
    header = "prompts | K | rounds | acceptance length, simulated (95%) | the head before it"
    return rows_of(header, rows)


@made_of("rounded-*")
def rounded(found: Results) -> str:
    """Of a head with its frequencies as they are, and rounded to bfloat16."""
    pairs = {
        "`builtin:text_eval`": ("rounded-none-text-80", "rounded-text-80"),
        "16 of 1,800 tokens": ("rounded-none-long", "rounded-long"),
    }
    at_four = {
        name: next(
            r for r in report["results"]
            if (r["category"], r["num_assistant_tokens"]) == ("all", 4)
        )
        for name, report in found.items()
    }  # fmt: skip
    rows = [[what, *(length(at_four[name]) for name in pair)] for what, pair in pairs.items()]
    return rows_of("prompts | acceptance length, simulated (95%) | frequencies rounded", rows)


@made_of("eval-300", "eval-long", "estimate-300")
def stale_keys(found: Results) -> str:
    """The stock decoder beside the one with clean keys and values, within and past the window."""
    rows = []
    for name in ("eval-300", "eval-long"):
        report = found[name]
        stock, exact = whole(report)[:2]
        count, columns = len(stock["per_text"]), report["per_text_columns"]
        prompts = f"{count} prompts, 20 new tokens"
        if "prompt_tokens" in columns:
            sizes = [text[columns.index("prompt_tokens")] for text in stock["per_text"]]
            prompts = f"{count} prompts of {min(sizes):,} to {max(sizes):,} tokens"
        change = difference(report, report, ("transformers", "exact"))
        rows.append([prompts, length(stock), length(exact), change])
    simulated = next(r for r in found["estimate-300"]["results"] if r["category"] == "all")
    rows.append(["the first, simulated", "", f"{simulated['acceptance_length']:.3f}", ""])
    return rows_of("prompts | stock decoder | clean-KV decoder | difference (95%)", rows)


@made_of("eval-64-earlier", "eval-64-newest", "eval-64-1200-steps")
def earlier_heads(found: Results) -> str:
    told = {
        "eval-64-1200-steps": "2,560 conversations of 128 tokens, 1,200 steps of 8 conversations",
        "eval-64-newest": "the recipe, drafts trained for the newest token alone",
        "eval-64-earlier": "the recipe, drafts trained at both positions",
    }
    rows: list[list[str]] = []
    before = None
    for name, what in told.items():
        of = {r["decoder"]: r for r in whole(found[name])}
        change = "" if before is None else difference(before, found[name], ("exact", "exact"))
        rows.append([what, length(of["exact"]), change, f"{of['lookup']['speedup']:.2f}"])
        before = found[name]
    header = (
        "head | clean-KV decoder, K = 4 | beside the one above (95%) | speedup of lookup that day"
    )
    return rows_of(header, rows)


@made_of("bench-draft-bf16", "bench-draft")
def draft_costs(found: Results) -> str:
    """What drafts and verifications cost, in steps of the target."""
    files = ("bench-draft-bf16", "bench-draft")
    ratios = [found[name]["ratios"] for name in files]
    what = {
        "c_dense": "stock draft step, whole table",
        "c_ordered": "stock draft step, ordered embeddings",
        "c_exact_dense": "clean-KV draft step, whole table",
        "c_exact_ordered": "clean-KV draft step, ordered embeddings",
    }
    rows = [[text, *(f"{r[name]:.3f}" for r in ratios)] for name, text in what.items()]
    for k in (1, 2, 4, 8):
        rows.append([f"verification, K = {k}", *(f"{r['v'][k - 1]:.2f}" for r in ratios)])
    for name, text in (("break_even_ordered", "stock"), ("break_even_exact_ordered", "clean-KV")):
        cells = [f"{r[name][3]:.2f}" for r in ratios]
        rows.append([f"acceptance length from which K = 4 pays, {text}", *cells])
    return rows_of("steps of the target | bfloat16 | float32", rows)


ASKED = {
    "eval-64": "chat, code and others",
    "breakdown-structured": "under JSON schemas",
    "breakdown-long": "of 512 to 16,384 tokens, quickstart head",
}
"""Reports with breakdowns -> what was asked there."""


def _exact(report: dict[str, Any]) -> dict[str, Any]:
    return next(r for r in whole(report) if r["decoder"] == "exact")


@made_of("eval-64", "breakdown-structured", "breakdown-long")
def by_span(found: Results) -> str:
    """What the text is, in each report; their tokens and rounds sum to the totals."""
    header = " | ".join(["prompts", *page.SPAN_COLUMNS])
    rows = [
        [ASKED[name], *row]
        for name, report in found.items()
        for row in page.span_rows(
            _exact(report)["by_span"], page.straight_spans(report, _exact(report))
        )
    ]
    return rows_of(header, rows)


@made_of("breakdown-long")
def by_context(found: Results) -> str:
    header = " | ".join(page.CONTEXT_COLUMNS)
    return rows_of(header, page.context_rows(_exact(found["breakdown-long"])["by_context"]))


@made_of("rejections")
def rejections(found: Results) -> str:
    """Of each class of drafts how many were checked, how many accepted, and what it has of all
    rejections; the largest first."""
    rows = []
    for dimension, classes in found["rejections"]["found"].items():
        total = sum(counts["rejected"] for counts in classes.values())
        for name, counts in sorted(classes.items(), key=lambda one: -one[1]["rejected"]):
            accepted = 1 - counts["rejected"] / counts["drafts"]
            share = counts["rejected"] / max(total, 1)
            rows.append([dimension, name, counts["drafts"], f"{accepted:.0%}", f"{share:.0%}"])
    return rows_of("by | class | drafts checked | accepted | of all rejections", rows)


@made_of("breakdown-structured")
def structured(found: Results) -> str:
    """With drafts that know the schema, and with drafts that do not."""
    header = " | ".join([*page.STRUCTURED_COLUMNS, "speedup (95%)", "equal to plain"])
    report = found["breakdown-structured"]
    return rows_of(header, [
        [*page.structured_row(r), speedup(r), equal(r)] for r in whole(report)
    ])  # fmt: skip


SERVED = (
    "pair | engine | acceptance length in transformers (clean-KV) | in the engine "
    "| tokens per second plain | with the head | texts equal to transformers'"
)


PAIRS = {
    "gemma3-270m": "Gemma 3 270M",
    "gemma3-270m-int8": "Gemma 3 270M, int8",
    "plain-q8_0": "tiny, plain; in the engine Q8_0",
    "wide-bf16": "tiny, wide; in the engine bf16",
    "wide-q8_0": "tiny, wide; in the engine Q8_0",
    "wide-q4_k_m": "tiny, wide; in the engine Q4_K_M",
    "wide-q4_k_m-dequantized": "the same; in transformers the weights of that file too",
    "wide-q4_k_m-adapted": "the same, the head adapted to them",
}


def pair_of(file: str, kind: str) -> str:
    """The pair of a result file `KIND-PAIR-ENGINE`, as a table calls it."""
    pair = _pair(file, kind)
    return PAIRS.get(pair, f"tiny, {pair}")


def _pair(file: str, kind: str = "serve") -> str:
    return file.removeprefix(f"{kind}-").rpartition("-")[0]


def served_row(name: str, r: dict[str, Any]) -> list[str]:
    lengths, speed = r["acceptance_length"], r["tokens_per_second"]
    same = min(r["equal_texts"].values())
    return [
        pair_of(name, "serve"), r["environment"]["engine"],
        *(f"{lengths[side]:.3f}" for side in ("transformers", "engine")),
        *(f"{speed[f'engine_{side}']:.0f}" for side in ("plain", "assisted")),
        "all" if same == 1 else f"{same:.0%}",
    ]  # fmt: skip


@made_of("serve-*")
def served(found: Results) -> str:
    return rows_of(SERVED, [served_row(name, r) for name, r in found.items()])


@made_of("serve-gemma3-270m-vllm")
def served_real(found: Results) -> str:
    return rows_of(SERVED, [served_row(name, r) for name, r in found.items()])


@made_of("serve-gemma3-270m*litert")
def served_litert(found: Results) -> str:
    return rows_of(SERVED, [served_row(name, r) for name, r in found.items()])


@made_of("serve-plain-llama.cpp", "serve-plain-q8_0-llama.cpp", "serve-wide-*-llama.cpp")
def served_quantized(found: Results) -> str:
    """A target as llama.cpp is given it, in float32 and quantized."""
    pairs = list(PAIRS)
    ordered = sorted(found, key=lambda name: pairs.index(p) if (p := _pair(name)) in pairs else -1)
    return rows_of(SERVED, [served_row(name, found[name]) for name in ordered])


@made_of("serve-gemma3-270m-vllm")
def served_rates(found: Results) -> str:
    rates = found["serve-gemma3-270m-vllm"]["cumulative_acceptance_rate"]
    header = "share of rounds that accept | draft 1 | draft 2 | draft 3 | draft 4"
    told = {"engine": "vLLM", "transformers": "transformers"}
    return rows_of(header, [[told[s], *(f"{r:.3f}" for r in rates[s])] for s in told])


@made_of("concurrency-*-vllm")
def served_at_once(found: Results) -> str:
    """Several texts at once in vLLM's server, measured and predicted."""
    header = (
        "pair | texts at once | acceptance length | tokens per second plain | with the head "
        "| speedup | predicted | a draft, c | a verification, v"
    )
    return rows_of(header, [
        [pair_of(name, "concurrency"), r["texts"], f"{r['acceptance_length']:.3f}",
         f"{r['tokens_per_second_plain']:.0f}",
         f"{r['tokens_per_second_assisted']:.0f}", f"{r['speedup']:.2f}",
         f"{r['predicted_speedup']:.2f}", f"{r['c']:.2f}", f"{r['v']:.2f}"]
        for name, report in found.items() for r in report["concurrency"]
    ])  # fmt: skip


@made_of("gpu-quickstart")
def gpu_quickstart(found: Results) -> str:
    header = (
        "decoder | K | prompts | acceptance length (95%) | tokens per second | speedup (95%) "
        "| texts equal to plain ones"
    )
    results = found["gpu-quickstart"]["found"]["eval"]["results"]
    return rows_of(header, [
        [NAMES[r["decoder"]], r["num_assistant_tokens"], r["prompts"], length(r),
         f"{r['tokens_per_second']:.0f} (plain {r['baseline_tokens_per_second']:.0f})",
         speedup(r), equal(r)]
        for r in results
    ])  # fmt: skip


@made_of("gpu-generation", "gpu-extracting", "gpu-head_step", "gpu-draft_cost", "gpu-attention")
def gpu_speeds(found: Results) -> str:
    """Random weights in the shape of Gemma 4 E4B on one card."""
    generation, extracting, step, draft, attention = (c["found"] for c in found.values())
    speeds = [v for name, v in extracting.items() if name != "tokens"]
    seconds, one, ratios = step["seconds"], draft["one step"], draft["2 layers"]["ratios"]
    cudnn, without = attention["as it comes"], attention["cudnn off"]
    query, many = "one query, width 256, no mask", "256 queries, forward and backward"
    return rows_of("what | measured", [
        [f"generation, batches of {generation['batch']}",
         f"{generation['cudnn off']['tokens_per_second']:,.0f} tokens per second"],
        ["extraction", f"{min(speeds):,.0f} to {max(speeds):,.0f} tokens per second"],
        [f"step of a two-layer head on {step['tokens a batch']:,} tokens: compute, loader, copy",
         ", ".join(f"{1e3 * seconds[name]:.0f} ms" for name in (
             "step, 128 rows of candidates at once", "loader", "copy to the device"))],
        ["one step of plain decoding: kernels, time, share that the card works",
         f"{one['kernels']:,}, {1e3 * one['seconds']:.0f} ms, {one['busy']:.0%}"],
        ["clean-KV draft step of two layers / a step", f"{ratios['c_exact_ordered']:.3f}"],
        ["attention of one query: cuDNN, without it",
         f"{1e3 * cudnn[query]:.0f} ms, {1e3 * without[query]:.2f} ms"],
        ["attention of 256 queries under a mask, forward and backward: cuDNN, without it",
         f"{1e3 * cudnn[many]:,.0f} ms, {1e3 * without[many]:.0f} ms"],
    ])  # fmt: skip
