"""From the sources of a run to the activations that it trains on and is validated on; and
`headstart regenerate` and `headstart extract`, which do the same to a folder."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from headstart.common.console import print_once
from headstart.configs.schema import Config, DataConfig, SourceConfig
from headstart.configs.settings import ServerConfig
from headstart.data.cache_folders import answers_folder, extraction_folder
from headstart.data.contamination import (
    NOT_CHECKED,
    also_rendered,
    remove_contaminated,
    stored_prompts,
    without_contaminated,
)
from headstart.data.conversations import (
    MANIFEST,
    Conversation,
    answers_name,
    encode_answered,
    find_answers,
    read_folder,
    read_manifest,
    taken_answers,
    template_variables,
    tokens_when_cut,
)
from headstart.data.documents import Chosen, Documents, Entry, WithPrompts
from headstart.data.extraction import OnlineActivations, extract
from headstart.data.prompts import (
    Prompt,
    deal,
    load_prompt_set,
    load_prompts,
    schemas_of,
)
from headstart.data.regenerate import (
    Job,
    batches_of,
    check_lengths,
    is_done,
    make_jobs,
    regenerate,
)
from headstart.data.sources import check_there
from headstart.data.splits import LeftOut, cluster, hold_out
from headstart.data.store import ActivationStore, describe_store
from headstart.data.templates import encode_prompts
from headstart.heads.kinds import inputs_of
from headstart.heads.loading import load_target_tokens, open_target
from headstart.heads.pairing import head_config
from headstart.heads.structured import check_structured
from headstart.heads.target import KEYS_AND_VALUES, Inputs, Target
from headstart.heads.tokens import Sampling, TargetTokens

AS_THEY_ARE = (
    "data.num_conversations, data.max_new_tokens and data.temperatures do not apply to "
    "conversations that are there; in training data.filter chooses among them"
)


def prepare_documents(
    target: Target,
    data: DataConfig,
    seed: int,
    held_out: str | None,
    inputs: Inputs = KEYS_AND_VALUES,
) -> tuple[Documents, Documents]:
    """Training and validation activations; validation text is greedy, of other sources and, as far
    as the prompts go, other text and other templates (`hold_out`).

    Whatever an earlier call has finished is reused. `seed` decides the choice of prompts, the
    sampling and the held-out sources; `held_out` are the prompts of the later evaluation, of which
    no training prompt may be a copy; `inputs` what the head reads, which is all that is stored.

    Raises:
        ValueError: a source is missing, malformed or too small to hold out from, or a folder is
            of another target.
    """
    planned = plan_documents(target, data, seed, held_out, inputs)
    training, validation, _ = planned.prepare()
    return training, validation


class Prepared(NamedTuple):
    """What `prepare_documents` returns, and what is on neither side of the split or on both."""

    training: Documents
    validation: Documents
    left_out: LeftOut


@dataclass(frozen=True)
class Questions:
    """Prompts that the target answers."""

    jobs: list[Job]
    folder: Path
    """Of the answers; what is there already is not written again."""
    inputs: Inputs
    """What is stored there of the activations, of what heads read."""
    greedy: bool
    """Whether they are held out for the validation."""

    def missing(self, data: DataConfig) -> list[list[Job]]:
        """The batches that are not answered yet."""
        batches = enumerate(batches_of(self.jobs, data))
        return [b for n, b in batches if not is_done(self.folder, n, extract=not data.online)]


@dataclass(frozen=True)
class PlannedDocuments:
    """The documents of a run before the target has run: what there is to do is known."""

    target: Target
    data: DataConfig
    seed: int
    held_out: str | None
    questions: list[Questions]
    """Of training and validation; none where `data` names texts that are there."""
    sources: Sequence[tuple[SourceConfig, list[Prompt] | None]]
    """What the training texts answer, and all prompts that were read there (None: not read); none
    where that is not known of the texts that are there."""
    left_out: LeftOut | None = None
    """Of these prompts; None where there are none."""
    inputs: Inputs = KEYS_AND_VALUES
    """What the head reads."""

    def prepare(self) -> Prepared:
        """As of `prepare_documents`, and what the split left out."""
        if not self.questions:
            found = _prepare_stored(self.target, self.data, self.seed, self.held_out, self.inputs)
        else:
            assert self.left_out is not None, "there are prompts"
            training, validation = (
                _answered(self.target, asked, self.data, self.seed) for asked in self.questions
            )
            found = Prepared(training, validation, self.left_out)
        if self.data.completion_only_loss:
            return found
        return found._replace(training=WithPrompts(found.training))


def plan_documents(
    target: Target,
    data: DataConfig,
    seed: int,
    held_out: str | None,
    inputs: Inputs = KEYS_AND_VALUES,
) -> PlannedDocuments:
    """Read and deal the prompts of a run; arguments and errors as of `prepare_documents`."""
    shipped = data.shipped and data.store is None
    data = taken_answers(target, data)
    inputs = inputs._replace(prompts=not data.completion_only_loss)
    planned = PlannedDocuments(target, data, seed, held_out, [], [], inputs=inputs)
    if data.store is not None or data.conversations is not None:
        return replace(planned, sources=[(s, None) for s in data.prompts] if shipped else [])
    loaded = [load_prompts(source, data.max_bad_rows) for source in data.prompts]
    sources = load_sources(data, held_out, target, loaded)
    everything = [prompt for prompts, _ in sources for prompt in prompts]
    split = hold_out(everything, cluster(everything), data.validation_conversations, seed)
    validation = [everything[i] for i in split.held_out]
    kept = _without_copies([everything[i] for i in split.training], validation)
    left = set(map(id, kept))
    unlike = [([p for p in prompts if id(p) in left], weight) for prompts, weight in sources]
    training = deal_prompts(unlike, data, seed)
    questions = [
        _questions(target, training, data, seed, False, inputs),
        _questions(target, validation, data, seed, True, inputs),
    ]
    read = list(zip(data.prompts, loaded, strict=True))
    left_out = split.tell("prompts", copies=len(split.training) - len(kept))
    return replace(planned, questions=questions, sources=read, left_out=left_out)


def _prepare_stored(
    target: Target, data: DataConfig, seed: int, held_out: str | None, inputs: Inputs
) -> Prepared:
    """From `data.store` or `data.conversations`."""
    data = data.model_copy(update={"chat_template_kwargs": template_variables(data)})
    stored = _open_stored(target, data, inputs)
    asked = stored_prompts(stored, target)
    documents = without_contaminated(stored, asked, target, data, held_out)
    asked = [asked[i] for i in documents.which]
    entries = documents.entries
    greedy = [entry.temperature == 0 for entry in entries]
    count = data.validation_conversations
    validation: list[Prompt] = []
    if any(greedy):
        once = _first_of_each(entries, asked, greedy)
        split = hold_out(entries, cluster(asked), count, seed, among=once)
        repeated = [asked[i] for i in split.held_out]
    else:
        print_once(
            "No greedy text of this target there to validate on: data.prompts are answered for it"
        )
        prompts = [prompt for group, _ in load_sources(data, held_out) for prompt in group]
        both = [True] * len(prompts) + [False] * len(entries)
        clusters = cluster([*prompts, *asked])
        split = hold_out([*prompts, *entries], clusters, count, seed, among=both)
        validation = [prompts[i] for i in split.held_out]
        split = split.of_rest(len(prompts))
        repeated = also_rendered(validation, target, data)
    kept = _without_copies([asked[i] for i in split.training], repeated)
    left = set(map(id, kept))
    left_out = split.tell("conversations", copies=len(split.training) - len(kept))
    training = Chosen(documents, [i for i in split.training if id(asked[i]) in left])
    trained_on = _asked_for(training, data, seed)
    if any(greedy):
        return Prepared(trained_on, Chosen(documents, split.held_out), left_out)
    questions = _questions(target, validation, data, seed, True, inputs)
    return Prepared(trained_on, _answered(target, questions, data, seed), left_out)


def _first_of_each(entries: Sequence[Entry], asked: list[Prompt], greedy: list[bool]) -> list[bool]:
    """Whether each document is the first greedy one of its prompt: asked again, a target answers
    the same, and whole sources with many copies each come to no number that is asked for."""
    met, first = set(), []
    for entry, prompt, may in zip(entries, asked, greedy, strict=True):
        key = entry.source, entry.id.partition("#")[0], prompt.text
        first.append(may and key not in met)
        if may:
            met.add(key)
    return first


def _open_stored(
    target: Target, data: DataConfig, inputs: Inputs
) -> ActivationStore | OnlineActivations:
    """`data.store`, or the activations of `data.conversations`."""
    if data.store is not None:
        store = ActivationStore(data.store, target, inputs)
        print_once(
            f"{data.store}: {len(store):,} documents; of data.* only validation_conversations and "
            "filter apply to them"
        )
        return store
    assert data.conversations is not None, "the caller knows one of the two"
    print_once(f"{answers_name(data.conversations)}: {AS_THEY_ARE}")
    if data.online:
        written = list(stream_folder(data.conversations, target))
        return OnlineActivations(target, written, data, inputs)
    folder, inputs = extraction_folder(target, data, inputs)
    return extract_folder(target, data.conversations, data, folder, inputs=inputs)


def _asked_for(training: Documents, data: DataConfig, seed: int) -> Documents:
    """Of the documents that are there, those at `data.filter.temperatures` and of
    `data.filter.categories`, and of them `data.filter.num_conversations` at random.

    Raises:
        ValueError: there are fewer.
    """
    wanted, count = data.filter, data.filter.num_conversations
    kept = [
        i
        for i, e in enumerate(training.entries)
        if (wanted.temperatures is None or e.temperature in wanted.temperatures)
        and (wanted.categories is None or e.category in wanted.categories)
    ]
    if not kept or len(kept) < (count or 0):
        raise ValueError(
            f"{len(kept)} of {len(training.entries)} documents are left by data.filter, whose "
            f"num_conversations asks for {count or 1}"
        )
    if count is not None:
        kept = sorted(random.Random(seed).sample(kept, count))
    return Chosen(training, kept)


def load_sources(
    data: DataConfig,
    held_out: str | None,
    tokens: TargetTokens | None = None,
    loaded: list[list[Prompt]] | None = None,
) -> list[tuple[list[Prompt], float | None]]:
    """The prompts of each source (`loaded`, where they are read already) and its weight, without
    copies of evaluation prompts; prints how many those are.

    Raises:
        ValueError: a source is missing or malformed, or a prompt of the evaluation cannot be used
            with the target of `tokens`, which would be noticed only after the training.
    """
    loaded = loaded or [load_prompts(source, data.max_bad_rows) for source in data.prompts]
    if held_out is None:
        print_once(NOT_CHECKED)
        return [(own, source.weight) for own, source in zip(loaded, data.prompts, strict=True)]
    evaluation = load_prompt_set(held_out)
    if schemas_of(evaluation):
        check_structured()
    if tokens is not None:
        encode_prompts(evaluation, tokens.tokenizer, data.chat_template_kwargs)
    cleaned = []
    for source, prompts in zip(data.prompts, loaded, strict=True):
        kept, found = remove_contaminated(prompts, evaluation)
        print_once(f"{source.path} against {held_out}: {found.describe()}")
        cleaned.append((kept, source.weight))
    return cleaned


def deal_prompts(
    sources: list[tuple[list[Prompt], float | None]], data: DataConfig, seed: int
) -> list[Prompt]:
    """`data.num_conversations` prompts of the mixture.

    Raises:
        ValueError: none is left.
    """
    if not any(prompts for prompts, _ in sources):
        raise ValueError(
            "no training prompts are left: all are held out, or copies of held-out or evaluation "
            "prompts; add others, or lower data.validation_conversations"
        )
    return deal(sources, data.num_conversations or sum(len(p) for p, _ in sources), seed)


def deal_sampling(data: DataConfig, tokens: TargetTokens, prompts: list[Prompt]) -> list[Sampling]:
    """`data.temperatures`, round robin over the prompts, and over the times each is answered."""
    ways = [tokens.own_sampling if t == "model" else Sampling(t) for t in data.temperatures]
    next_way: dict[int, int] = {}
    dealt = []
    for prompt in prompts:
        way = next_way.get(id(prompt), len(next_way))
        next_way[id(prompt)] = way + 1
        dealt.append(ways[way % len(ways)])
    return dealt


def _without_copies(prompts: list[Prompt], held_out: list[Prompt]) -> list[Prompt]:
    """The prompts that are no exact copies of held-out ones; prints how many are, if any. Near ones
    stay: of stored ones they would be all that share a long system prompt."""
    kept, found = remove_contaminated(prompts, held_out, near=False)
    if found.pairs:
        print_once(f"Held out for validation: {found.describe('held-out')}")
    return kept


BAD_HELD_OUT = 0.2
"""Share of held-out prompts that a target may refuse, where it may refuse any."""


def _questions(
    target: Target,
    prompts: list[Prompt],
    data: DataConfig,
    seed: int,
    greedy: bool,
    inputs: Inputs,
) -> Questions:
    """Prompts of the training or, to be answered greedily, of the validation, which is of answers
    alone."""
    inputs = inputs._replace(prompts=inputs.prompts and not greedy)
    if greedy and data.max_bad_rows:  # of so few one is a large share
        data = data.model_copy(update={"max_bad_rows": max(data.max_bad_rows, BAD_HELD_OUT)})
    sampling = [Sampling(0.0)] * len(prompts) if greedy else deal_sampling(data, target, prompts)
    jobs = make_jobs(prompts, sampling, target, data)
    if not data.online:  # of both before either is answered
        check_lengths(jobs, data)
    folder, inputs = answers_folder(target, jobs, data, seed, inputs)
    return Questions(jobs, folder, inputs, greedy)


def _answered(target: Target, asked: Questions, data: DataConfig, seed: int) -> Documents:
    """The target's answers."""
    extracted = not data.online
    doing = "  held out" if asked.greedy else "Generating"
    regenerate(
        target, asked.jobs, data, seed, asked.folder, extracted, description=doing,
        inputs=asked.inputs,
    )  # fmt: skip
    if extracted:
        return ActivationStore(asked.folder, target)
    written = list(stream_folder(asked.folder, target))
    return OnlineActivations(target, written, data, asked.inputs)


def extract_folder(
    target: Target,
    folder: Path,
    data: DataConfig,
    out: Path,
    variables: dict[str, Any] | None = None,
    inputs: Inputs = KEYS_AND_VALUES,
) -> ActivationStore:
    """Extract the conversations of `headstart regenerate`, a part at a time; `variables` and
    `inputs` as in `extract`."""
    tokens = tokens_when_cut(read_folder(folder), data.max_tokens)
    conversations = stream_folder(folder, target)
    return extract(target, conversations, tokens, data, out, variables, inputs)


def stream_folder(folder: Path, target: Target) -> Iterator[Conversation]:
    """The conversations of `headstart regenerate`, a part at a time.

    Those of another model lose their temperature: they are not this target's greedy text. The same
    weights in another dtype are no other model: their texts diverge where two tokens are nearly
    tied, as those of two machines do.

    Raises:
        ValueError: the folder is unfinished, damaged, or tokenized for another vocabulary.
    """
    manifest, name = read_manifest(folder), answers_name(folder)
    if manifest["tokenizer"] != target.tokenizer_hash:
        raise ValueError(
            f"{name} was tokenized for {manifest['target']} ({manifest['tokenizer'][:12]}), and "
            f"{target.name} has another tokenizer ({target.tokenizer_hash[:12]}): regenerate it"
        )
    own, written = str(target.table.dtype).removeprefix("torch."), None
    if manifest["fingerprint"] is not None:
        written = target.dtype_of(manifest["fingerprint"])
    elif (manifest["target"], manifest["revision"]) == (target.name, target.revision):
        # A server wrote it, which shows no weights.
        written = own
    if written is None:
        print_once(f"{name} was written by {manifest['target']}, which is not this {target.name}")
    elif written != own:
        print_once(f"{name} was written by the same weights in {written}; here they are {own}")
    for conversation in read_folder(folder):
        yield replace(conversation, temperature=None) if written is None else conversation


def run_regenerate(config: Config, server: ServerConfig, extracting: bool, device: Any) -> None:
    """Let the target answer the prompts of `config.data` into the folder `config.output_dir`.

    An interrupted call goes on there; the prompts of the configuration's evaluation are kept out.
    With `extracting` the activation store is written into the same folder, from the same forwards:
    what heads such as that of the configuration read. The target runs on `device`, or in the server
    where one is named.

    Raises:
        ValueError: bad prompts, a folder of other conversations, or a combination that cannot be.
    """
    if server.url is not None and extracting:
        raise ValueError(
            "a server hands out text, no activations: leave out server.url, or let `headstart "
            "regenerate` write conversations and give them to `headstart extract`"
        )
    d, out = config.data, config.output_dir
    held_out = config.eval.prompts if config.eval else None
    prompts = deal_prompts(load_sources(d, held_out), d, config.seed)
    if server.url is None:
        target = open_target(config.target, device)
        jobs = make_jobs(prompts, deal_sampling(d, target, prompts), target, d)
        inputs = inputs_read(config, target)
        regenerate(target, jobs, d, config.seed, out, extracting, inputs=inputs)
    else:
        # Its client takes half a second to import, and training reads this file too.
        from headstart.data.server import AnswerServer, regenerate_by_server

        tokens = load_target_tokens(config.target)
        jobs = make_jobs(prompts, deal_sampling(d, tokens, prompts), tokens, d)
        answers = AnswerServer(server, tokens.tokenizer, tokens.eos_ids)
        regenerate_by_server(answers, tokens, jobs, d, config.seed, out)
    print_once(f"Written: {out} ({len(jobs):,} conversations)")
    if extracting:
        print_once(describe_store(ActivationStore(out)))


def inputs_read(config: Config, target: Target) -> Inputs:
    """What the head of a configuration, and its training, read of its target."""
    head = head_config(target.config, config.head, config.train.num_speculative_steps)
    return inputs_of(head)._replace(prompts=not config.data.completion_only_loss)


def run_extract(config: Config, conversations: str, device: Any) -> None:
    """Run the target of `config` over conversations and write the activation store
    `config.output_dir`, of what heads such as that of `config` read; an interrupted call goes on
    there. `conversations` is a folder of `headstart regenerate`, or any source of whole
    conversations.

    Raises:
        ValueError: bad conversations, a folder of another store, or too small a disk.
    """
    d, out = config.data, config.output_dir
    folder = find_answers(conversations)
    if not (written := (folder / MANIFEST).is_file()):
        check_there(conversations)
    print_once(f"{answers_name(folder) if written else conversations}: {AS_THEY_ARE}")
    target = open_target(config.target, device)
    inputs = inputs_read(config, target)
    if written:
        variables = template_variables(d.model_copy(update={"conversations": folder}))
        store = extract_folder(target, folder, d, out, variables, inputs)
    else:
        rows = encode_source(conversations, target, config)
        tokens = tokens_when_cut(rows, d.max_tokens)
        store = extract(target, rows, tokens, d, out, d.chat_template_kwargs, inputs)
    print_once(f"Written: {out}")
    print_once(describe_store(store))


def encode_source(path: str, tokens: TargetTokens, config: Config) -> list[Conversation]:
    """Whole conversations of any source, with the tokens that the assistant wrote.

    Raises:
        ValueError: more of them than `data.max_bad_rows` have no answer or do not fit the target's
            chat template.
    """
    d = config.data
    source = next((s for s in d.prompts if s.path == path), path)
    return encode_answered(load_prompts(source, d.max_bad_rows), path, tokens, d)
