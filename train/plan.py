"""`headstart train --plan`: what a run will hold and read, from the configurations."""

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from headstart.configs.schema import Config
from headstart.data.store import bytes_per_token
from headstart.heads.assistant import assistant_config
from headstart.heads.targets import load_target_config, source_layers


def print_plan(config: Config, console: Console | None = None) -> None:
    """Print `plan(config)` as a table."""
    table = Table(title=f"Plan of {config.run.dir}", show_header=False)
    for name, value in plan(config).items():
        table.add_row(name, value)
    (console or Console()).print(table)


def plan(config: Config) -> dict[str, str]:
    """Shapes, parameters, tokens and bytes of a run; no weights are loaded.

    Token counts are upper bounds: a response may end before `max_new_tokens`.
    """
    t, d, c = config.target, config.data, config.train
    source = load_target_config(t.name, t.revision, t.trust_remote_code).get_text_config()
    head = assistant_config(source, config.head)
    text = head.text_config
    with torch.device("meta"):
        assistant = AutoModelForCausalLM.from_config(head)
    shared = text.vocab_size * text.hidden_size
    trained = sum(p.numel() for p in assistant.parameters()) - shared
    if text.hidden_size < source.hidden_size:
        trained += source.hidden_size * text.hidden_size  # the projection of the low-rank tie
    width = 2 if t.dtype == "bfloat16" else 4
    token = bytes_per_token(source, width, d.teacher_top_k, d.storage)
    per_conversation = d.max_prompt_tokens + d.max_new_tokens
    count = d.num_conversations
    rows = c.batch_size * c.gradient_accumulation_steps * c.anchors
    return {
        "target": f"{t.name} ({source.model_type}, width {source.hidden_size}, "
        f"{source.num_hidden_layers} layers, {source.vocab_size:,} tokens, {t.dtype})",
        "shared KV from layers": ", ".join(f"{i} ({k})" for k, i in source_layers(source).items()),
        "head": f"{text.num_hidden_layers} layers ({', '.join(text.layer_types)}), "
        f"width {text.hidden_size}, MLP {text.intermediate_size}",
        "parameters trained": f"{trained:,}",
        "parameters shared with the target": f"{shared:,}"
        if text.hidden_size == source.hidden_size
        else "none: low-rank tie, materialised when saved",
        "training memory of the head": _bytes(trained * 16) + " (weights, gradients, two moments)",
        "conversations": f"{f'{count:,}' if count else 'one a prompt'} and "
        f"{d.validation_conversations:,} held out",
        "tokens": f"at most {count * per_conversation:,}, {count * d.max_new_tokens:,} of them "
        "answers"
        if count
        else f"at most {per_conversation:,} a conversation, {d.max_new_tokens:,} of them answers",
        "activation store": "none: the target runs inside the training step"
        if d.online
        else f"{token:,} bytes a token, at most "
        + (_bytes(count * per_conversation * token) if count else "that of all prompts"),
        "rows a step": f"{rows:,} a process, {c.rounds} rounds each",
        "steps": f"{c.steps:,} ({c.steps * rows:,} rows in all)",
    }


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
