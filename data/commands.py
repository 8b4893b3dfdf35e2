"""`headstart regenerate` and `headstart extract`: from a configuration to a folder."""

import sys
from pathlib import Path
from typing import Any

from headstart.configs.schema import Config
from headstart.data.conversations import MANIFEST, Conversation, template_variables
from headstart.data.extraction import extract
from headstart.data.jobs import make_jobs
from headstart.data.packing import length_when_cut
from headstart.data.prepare import deal_prompts, deal_sampling, extract_folder, load_sources
from headstart.data.prompts import load_prompts, report_refused
from headstart.data.regenerate import regenerate, regenerate_by_server
from headstart.data.server import AnswerServer
from headstart.data.store import ActivationStore
from headstart.data.templates import check_template, encode_conversation
from headstart.data.thoughts import lost_thought
from headstart.heads.loading import load_target_tokens, open_target
from headstart.heads.progress import say
from headstart.heads.text import one_line
from headstart.heads.tokens import TargetTokens


def run_regenerate(
    config: Config,
    out: Path,
    extracting: bool,
    device: Any,
    url: str | None = None,
    model: str | None = None,
    concurrency: int = 16,
    key_variable: str | None = None,
) -> None:
    """Let the target answer the prompts of `config.data` into the folder `out`.

    Args:
        config: its target, data and seed; the prompts of its evaluation are kept out.
        out: of the conversations; an interrupted call goes on there.
        extracting: write the activation store into the same folder, from the same forwards.
        device: where the target runs.
        url: of an OpenAI-compatible server that runs the target instead.
        model: its name there; None: the only one.
        concurrency: requests under way at once.
        key_variable: of the environment, with the server's key; None: `SERVER_KEY`.

    Raises:
        ValueError: bad prompts, a folder of other conversations, or a combination that cannot be.
    """
    if url is not None and extracting:
        raise ValueError(
            "a server hands out text, no activations: leave out --extract, and run `headstart "
            "extract` over what it wrote"
        )
    if url is None and model is not None:
        raise ValueError("--model names the target at a server: give --server too")
    if url is None and key_variable is not None:
        raise ValueError("--api-key-env names the key of a server: give --server too")
    d = config.data
    held_out = config.eval.prompts if config.eval else None
    prompts = deal_prompts(load_sources(d, held_out), d, config.run.seed)
    tokens: TargetTokens
    if url is None:
        tokens = target = open_target(config.target, device)
    else:
        tokens = load_target_tokens(config.target)
    jobs = make_jobs(prompts, deal_sampling(d, tokens, prompts), tokens, d)
    if url is None:
        regenerate(target, jobs, d, config.run.seed, out, extracting)
    else:
        server = AnswerServer(
            url, model, concurrency, tokens.tokenizer, tokens.eos_ids, key_variable
        )
        retokenised = regenerate_by_server(server, tokens, jobs, d, config.run.seed, out)
        if retokenised:
            print(f"{retokenised} answers came as text alone and were tokenised again")
    say(f"Written: {out} ({len(jobs):,} conversations)")
    if extracting:
        say(describe_store(ActivationStore(out)))


def describe_store(store: ActivationStore) -> str:
    """One line: documents, tokens, bytes a token, and the share of mass that the top k keep."""
    kept = [(e.top_k_mass, e.trained) for e in store.entries if e.top_k_mass is not None]
    mass = sum(m * n for m, n in kept) / max(sum(n for _, n in kept), 1)
    tokens = sum(e.length for e in store.entries)
    size = sum(shard["bytes"] for shard in store.index["shards"])
    return (
        f"Activations: {len(store):,} documents, {tokens:,} tokens, {size / tokens:,.0f} bytes a "
        f"token; the teacher's top {store.index['teacher_top_k']} keep {mass:.2%} of the mass"
    )


def run_extract(config: Config, conversations: str, out: Path, device: Any) -> None:
    """Run the target of `config` over conversations and write the activation store `out`.

    Args:
        config: its target and data.
        conversations: a folder of `headstart regenerate`, or any source of whole conversations.
        out: of the store; an interrupted call goes on there.
        device: where the target runs.

    Raises:
        ValueError: bad conversations, a folder of another store, or too small a disk.
    """
    d = config.data
    target = open_target(config.target, device)
    folder = Path(conversations)
    if (folder / MANIFEST).is_file():
        variables = template_variables(d.model_copy(update={"conversations": folder}))
        store = extract_folder(target, folder, d, out, variables)
    else:
        rows = encode_source(conversations, target, config)
        tokens = sum(length_when_cut(len(row.ids), d.max_tokens) for row in rows)
        store = extract(target, rows, tokens, d, out, variables=d.chat_template_kwargs)
    say(f"Written: {out}")
    say(describe_store(store))


def encode_source(path: str, tokens: TargetTokens, config: Config) -> list[Conversation]:
    """Whole conversations of any source, with the tokens that the assistant wrote.

    Raises:
        ValueError: more of them than `data.max_bad_rows` have no answer or do not fit the target's
            chat template.
    """
    d = config.data
    source = next((s for s in d.prompts if s.path == path), path)
    prompts = load_prompts(source, d.max_bad_rows)
    check_template(prompts, tokens)
    rows: list[Conversation] = []
    refused: list[tuple[str, str]] = []
    thoughtless: list[str] = []
    for prompt in prompts:
        try:
            ids, spans = encode_conversation(
                prompt, tokens.tokenizer, tokens.eos_ids, d.chat_template_kwargs
            )
        except ValueError as error:
            refused.append((prompt.id, str(error)))
            continue
        rows.append(Conversation(prompt.id, prompt.category, prompt.source, ids, spans))
        if lost_thought(prompt, ids, tokens.tokenizer):
            thoughtless.append(prompt.id)
    report_refused(refused, len(prompts), d.max_bad_rows)
    if thoughtless:
        told = (
            f"{path}: the chat template leaves thoughts out of {len(thoughtless)} of "
            f"{len(prompts)} conversations, first {thoughtless[0]}: their answers are trained on "
            "without them (it may keep them with a variable of data.chat_template_kwargs)"
        )
        print(one_line(told), file=sys.stderr)
    return rows
