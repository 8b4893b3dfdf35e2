"""`headstart regenerate` and `headstart extract`: from a configuration to a folder."""

from pathlib import Path
from typing import Any

from headstart.configs.schema import Config
from headstart.data.conversations import MANIFEST, Conversation
from headstart.data.extraction import extract
from headstart.data.prepare import (
    check_tokenizer,
    deal_sampling,
    deal_training_prompts,
    extract_folder,
)
from headstart.data.prompts import load_prompts
from headstart.data.regenerate import make_jobs, regenerate, regenerate_by_server
from headstart.data.server import AnswerServer
from headstart.data.templates import encode_conversation
from headstart.heads.targets import TargetTokens, load_target, load_target_tokens


def run_regenerate(
    config: Config,
    out: Path,
    extracting: bool,
    device: Any,
    url: str | None = None,
    model: str | None = None,
    concurrency: int = 16,
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

    Raises:
        ValueError: bad prompts, a folder of other conversations, or a combination that cannot be.
    """
    if url is not None and extracting:
        raise ValueError(
            "a server hands out text, no activations: leave out --extract, and run `headstart "
            "extract` over what it wrote"
        )
    t, d = config.target, config.data
    tokens: TargetTokens
    if url is None:
        tokens = target = load_target(t.name, t.dtype, t.revision, t.trust_remote_code, device)
    else:
        tokens = load_target_tokens(t.name, t.revision, t.trust_remote_code)
    sources = [(load_prompts(source, d.max_bad_rows), source.weight) for source in d.prompts]
    held_out = config.eval.prompts if config.eval else None
    prompts = deal_training_prompts(sources, d, config.run.seed, held_out)
    jobs = make_jobs(prompts, deal_sampling(d, tokens, len(prompts)), tokens, d)
    if url is None:
        regenerate(target, jobs, d, config.run.seed, out, extracting)
    else:
        server = AnswerServer(url, model, concurrency, tokens.tokenizer, tokens.eos_ids)
        retokenised = regenerate_by_server(server, tokens, jobs, d, config.run.seed, out)
        if retokenised:
            print(f"{retokenised} answers came as text alone and were tokenised again")
    print(f"Written: {out} ({len(jobs)} conversations)")


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
    t, d = config.target, config.data
    target = load_target(t.name, t.dtype, t.revision, t.trust_remote_code, device)
    folder = Path(conversations)
    if (folder / MANIFEST).is_file():
        check_tokenizer(folder, target)
        store = extract_folder(target, folder, d, out)
    else:
        rows = encode_source(conversations, target, config)
        tokens = sum(len(row.ids) for row in rows)
        store = extract(target, rows, len(rows), tokens, d, out)
    masses = [e.top_k_mass for e in store.entries if e.top_k_mass is not None]
    size = sum(shard["bytes"] for shard in store.index["shards"])
    tokens = sum(e.length for e in store.entries)
    print(
        f"Written: {out} ({len(store):,} documents, {tokens:,} tokens, {size / tokens:,.0f} bytes "
        f"each, mean mass of the top {d.teacher_top_k}: {sum(masses) / max(len(masses), 1):.4f})"
    )


def encode_source(path: str, tokens: TargetTokens, config: Config) -> list[Conversation]:
    """Whole conversations of any source, with the tokens that the assistant wrote.

    Raises:
        ValueError: more of them than `data.max_bad_rows` have no answer or do not fit the target's
            chat template.
    """
    d = config.data
    source = next((s for s in d.prompts if s.path == path), path)
    prompts = load_prompts(source, d.max_bad_rows)
    rows, refused = [], list[str]()
    for prompt in prompts:
        try:
            ids, spans = encode_conversation(
                prompt, tokens.tokenizer, tokens.eos_ids, d.chat_template_kwargs
            )
        except ValueError as error:
            refused.append(f"{prompt.id}: {error}")
            continue
        rows.append(Conversation(prompt.id, prompt.category, prompt.source, ids, spans))
    if refused:
        report = f"{len(refused)} of {len(prompts)} conversations cannot be used (first: "
        report += f"{refused[0]})"
        if len(refused) > d.max_bad_rows * len(prompts):
            raise ValueError(f"{report}; data.max_bad_rows={d.max_bad_rows:g} allows fewer")
        print(f"{report}; skipped")
    return rows
