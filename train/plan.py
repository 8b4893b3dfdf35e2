"""`headstart train --plan`: what a run will hold and read, from the configurations."""

import math
from typing import Any

import torch
from rich.table import Table
from transformers import AutoModelForCausalLM

from headstart.common.console import plain_console
from headstart.configs.schema import Config, DataConfig, HeadConfig, TrainConfig
from headstart.data.conversations import (
    answers_name,
    planned_answers,
    read_folder,
    read_manifest,
    tokens_when_cut,
)
from headstart.data.store import bytes_per_token, read_index
from headstart.heads.describe import published_config, published_head
from headstart.heads.kinds import inputs_of, kind_of
from headstart.heads.loading import load_target_config
from headstart.heads.pairing import head_config
from headstart.heads.saving import add_lora
from headstart.heads.target import source_layers
from headstart.train.memory import (
    CHECK,
    HeadSize,
    Launch,
    RunShapes,
    longest_text,
    needed,
    peaks,
    target_size,
)

LAUNCHES = {
    "alone": Launch(),
    "by DDP over 8": Launch(8),
    "by FSDP2 over 8": Launch(8, fsdp=True),
}
"""Ways to run whose memory a plan says."""


def print_plan(config: Config) -> None:
    """Print `plan(config)` as a table."""
    table = Table(title=f"Plan of {config.output_dir}", show_header=False)
    for name, value in plan(config).items():
        table.add_row(name, value)
    plain_console().print(table)


def plan(config: Config) -> dict[str, str]:
    """Shapes, parameters, tokens and bytes of a run; no weights are loaded.

    Token counts are upper bounds: a response may end before `max_new_tokens`.
    """
    t, d, c = config.target, config.data, config.train
    shapes = run_shapes(config)
    source, head, size = shapes.text, shapes.head, shapes.size
    text, kind = head.get_text_config(), kind_of(head)
    shared = text.vocab_size * text.hidden_size
    width = 2 if t.dtype == "bfloat16" else 4
    inputs = inputs_of(head)
    token = bytes_per_token(source, width, d.teacher_top_k, d.storage, inputs)
    each = c.batch_size * c.gradient_accumulation_steps
    k, answered = c.num_speculative_steps, planned_answers(config)
    rows, later = each * c.max_anchors, each * (c.multi_step_anchors or c.max_anchors)
    drafts = rows + later * (k - 1)
    # Of a head that reads whole texts the first round runs over all of them.
    run = drafts + (each * longest_text(answered) - rows) * inputs.whole_texts
    return {
        "target": f"{t.name} ({source.model_type}, width {source.hidden_size}, "
        f"{source.num_hidden_layers} layers, {source.vocab_size:,} tokens, {t.dtype})",
        **(
            {"shapes": "as published (heads/describe.py); the text model alone"}
            if published_config(t.name)
            else {}
        ),
        **({"shared KV from layers": _shared_kv(source)} if inputs.kv else {}),
        "head": f"{kind.name}: {kind.describe(head)}",
        "parameters trained": f"{size.trained:,}",
        "parameters shared with the target": f"{shared:,}"
        if text.hidden_size == source.hidden_size
        else "none: a table of its own, frozen"
        if config.head.warm
        else "none: low-rank tie, materialized when saved",
        **_plan_clusters(head, config.head),
        **_plan_memory(config.model_copy(update={"data": answered}), shapes),
        **_plan_data(answered, token),
        "rows a step": f"{rows:,} a process, {drafts:,} drafts in {k} rounds"
        + (f"; the head runs on up to {run:,} rows" if run > drafts else ""),
        "steps": _plan_steps(c, d, each, rows),
        **_plan_step(
            c,
            source,
            round((size.trained + size.frozen) * kind.draft_share(head)),
            rows,
            drafts,
            run,
        ),
    }


def _shared_kv(source: Any) -> str:
    return ", ".join(f"{i} ({name})" for name, i in source_layers(source).items())


def _plan_steps(c: TrainConfig, d: DataConfig, each: int, rows: int) -> str:
    if c.num_epochs is None:
        return f"{c.max_steps:,} ({c.max_steps * rows:,} rows in all)"
    passes = f"{c.num_epochs:g} passes over the conversations, {each} in each step"
    if d.num_conversations is None or d.store is not None or d.conversations is not None:
        return passes
    return f"{math.ceil(c.num_epochs * d.num_conversations / each):,}: {passes}"


def _plan_step(
    c: Any, source: Any, trained: int, rows: int, drafts: int, run: int
) -> dict[str, str]:
    """Floating-point operations of a step of one process, attention left out: it is little.

    A product with a trained weight counts three times two operations (forward, and the gradients of
    input and weight); with the frozen table twice two, and once more for the teacher, whose logits
    are computed once a position, of which there are at most `rows + rounds` for all rounds. The
    head runs on `run` rows, of which `drafts` count.
    """
    width = source.hidden_size
    candidates = source.vocab_size
    if c.vocabulary == "sparse":
        candidates = min(source.vocab_size, c.likely_tokens + c.negatives)
    head = 6 * trained * run
    objective = candidates * width * (4 * drafts + 2 * (rows + c.num_speculative_steps))
    in_all = ""
    if c.num_epochs is None:
        in_all = f"; {(head + objective) * c.max_steps / 1e15:.1f} PFLOP in all steps"
    return {
        "a step computes": f"{(head + objective) / 1e12:.2f} TFLOP a process: {head / 1e12:.2f} in "
        f"the head, {objective / 1e12:.2f} in the objective over {candidates:,} candidates or some "
        f"more{in_all}",
    }


def run_shapes(config: Config) -> RunShapes:
    """The shapes of a run's target and head; of a published target without asking the network."""
    t = config.target
    published = published_config(t.name)
    whole = published or load_target_config(t.name, t.revision, t.trust_remote_code)
    text = whole.get_text_config()
    start = published_head(config.head.init_from) or config.head
    head = head_config(text, start, config.train.num_speculative_steps)
    return RunShapes(text, target_size(whole), head, head_size(head, text, config.head))


def head_size(head: Any, source: Any, h: HeadConfig) -> HeadSize:
    """Parameters of a head in training, counted on the meta device: without the table, and without
    clusters, which are made of a head that is trained.

    Args:
        head: the assistant's configuration.
        source: the target's text configuration.
        h: of the run.
    """
    with torch.device("meta"):
        assistant = AutoModelForCausalLM.from_config(head)
    if assistant.masked_embedding is not None:
        assistant.masked_embedding = None
    text = head.get_text_config()
    table = text.vocab_size * text.hidden_size
    every = sum(p.numel() for p in assistant.parameters()) - table
    narrow = text.hidden_size < source.hidden_size
    own = table if narrow and h.warm else 0
    if narrow and not h.warm:
        every += source.hidden_size * text.hidden_size  # the projection of the low-rank tie
    if h.lora is not None:
        add_lora(assistant, h.lora)
        adapter = sum(p.numel() for p in assistant.parameters() if p.requires_grad)
        return HeadSize(adapter, every, own)
    if parts := h.trainable_modules:
        named = assistant.named_parameters()
        chosen = sum(p.numel() for name, p in named if any(part in name for part in parts))
        return HeadSize(chosen, every - chosen, own)
    return HeadSize(every, 0, own)


def _plan_memory(config: Config, shapes: RunShapes) -> dict[str, str]:
    """What a GPU holds at the fullest moment of each phase, and the machine beside it."""
    width, target = 2 if config.target.dtype == "bfloat16" else 4, shapes.target
    found = {name: dict(peaks(config, shapes, launch)) for name, launch in LAUNCHES.items()}
    lines = {
        "target's weights": f"{_bytes(target.layers * width)} of layers, "
        f"{_bytes(target.rest * width)} of embeddings and the rest"
        + ("; layers split where there are several processes" if config.target.sharded else ""),
        "a GPU holds at most": _by_launch({name: needed(one) for name, one in found.items()}),
    }
    for phase in found["alone"]:
        last = " on the first; left out where that does not fit" if phase == CHECK else ""
        in_each = _by_launch({name: one[phase] for name, one in found.items()})
        lines[f"in {phase}"] = in_each + last
    return lines


def _by_launch(found: dict[str, int]) -> str:
    """`3.00 GiB alone or by DDP over 8, 2.00 GiB by FSDP2 over 8`; one size where all are equal."""
    if len(set(found.values())) == 1:
        return _bytes(next(iter(found.values())))
    names: dict[int, list[str]] = {}
    for name, count in found.items():
        names.setdefault(count, []).append(name)
    return ", ".join(f"{_bytes(count)} {' or '.join(same)}" for count, same in names.items())


def _plan_clusters(head: Any, asked: HeadConfig) -> dict[str, str]:
    if not (head.use_ordered_embeddings and asked.use_ordered_embeddings):
        return {"LM head": "dense: every draft reads the whole table"}
    size = head.get_text_config().vocab_size // head.num_centroids
    return {
        "LM head": f"ordered embeddings: {head.num_centroids:,} clusters of {size:,} tokens, a "
        f"draft reads {head.centroid_intermediate_top_k:,} of them"
    }


def _plan_data(d: DataConfig, token: int) -> dict[str, str]:
    """Conversations, tokens and bytes; `token` bytes are stored of each."""
    if d.store is not None:
        shards = read_index(d.store)["shards"]
        documents = [entry for shard in shards for entry in shard["documents"]]
        return {
            "conversations": f"{len(documents):,} of {d.store}, "
            f"{d.validation_conversations:,} of them held out",
            "tokens": f"{sum(entry['length'] for entry in documents):,}, "
            f"{sum(entry['trained'] for entry in documents):,} of them answers",
            "activation store": f"{_bytes(sum(shard['bytes'] for shard in shards))}, there already",
        }
    count: int | None = d.num_conversations
    named = "one a prompt" if count is None else f"{count:,}"
    apart = "and {} held out"
    if d.conversations is not None:
        tokens = tokens_when_cut(read_folder(d.conversations), d.max_tokens)
        words, size = (
            f"{tokens:,} of {answers_name(d.conversations)}",
            f"at most {_bytes(tokens * token)}",
        )
        named = f"{read_manifest(d.conversations)['conversations']:,}"
        apart = "written already, {} of them held out"
    else:
        each = d.max_prompt_tokens + d.max_new_tokens
        words = f"at most {each:,} a conversation, {d.max_new_tokens:,} of them answers"
        size = "as many as the prompts make"
        if count is not None:
            words = f"at most {count * each:,}, {count * d.max_new_tokens:,} of them answers"
            size = f"at most {_bytes(count * each * token)}"
    return {
        "conversations": f"{named} {apart.format(f'{d.validation_conversations:,}')}",
        "tokens": words,
        "activation store": "none: the target runs inside the training step"
        if d.online
        else f"{size} ({token:,} bytes a token)",
    }


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
