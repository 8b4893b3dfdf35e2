"""From the sources of a run to the activations it trains on and those it is validated on."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from headstart.configs.schema import DataConfig
from headstart.data.contamination import remove_contaminated
from headstart.data.conversations import (
    Conversation,
    count_tokens,
    finished_parts,
    read_manifest,
    read_part,
    stable_hash,
)
from headstart.data.extraction import OnlineActivations, extract
from headstart.data.prompts import Prompt, deal, load_prompts, split_by_source
from headstart.data.regenerate import Job, conversation_settings, make_jobs, regenerate
from headstart.data.shards import Document, Entry
from headstart.data.store import ActivationStore, Documents
from headstart.heads.demo import cache_dir
from headstart.heads.targets import Sampling, Target, TargetTokens


class Chosen:
    """Some of the documents of a larger collection."""

    def __init__(self, documents: Documents, which: Sequence[int]):
        self.documents, self.which = documents, which
        self.entries: Sequence[Entry] = [documents.entries[i] for i in which]

    def read(self, which: Sequence[int]) -> list[Document]:
        """The documents with these indices among the chosen ones."""
        return self.documents.read([self.which[i] for i in which])

    def prompts(self) -> Iterator[list[int]]:
        """The token ids of each chosen document before the first that is trained."""
        everything = list(self.documents.prompts())
        return (everything[i] for i in self.which)


def prepare_documents(
    target: Target, data: DataConfig, seed: int, held_out: Path | None
) -> tuple[Documents, Documents]:
    """Training and validation activations; validation text is greedy and of other sources.

    Whatever an earlier call has finished is reused.

    Args:
        target: the model that answers and is distilled.
        data: where prompts, conversations or activations come from.
        seed: of the choice of prompts, the sampling and the held-out sources.
        held_out: prompts of the later evaluation, of which no training prompt may be a copy.

    Raises:
        ValueError: a source is missing, malformed or too small to hold out from, or a folder is
            of another target.
    """
    if data.store is not None or data.conversations is not None:
        documents: Documents
        if data.store is not None:
            documents = ActivationStore(data.store, target)
        else:
            documents = _activations_of(target, data)
        if held_out is not None:
            documents = without_contaminated(documents, target, held_out)
        return split_documents(documents, data.validation_conversations, seed)
    training, validation = choose_prompts(data, seed, held_out)
    sampling = deal_sampling(data, target, len(training))
    greedy = [Sampling(0.0)] * len(validation)
    return (
        _answered(target, make_jobs(training, sampling, target, data), data, seed, "Generating"),
        _answered(target, make_jobs(validation, greedy, target, data), data, seed, "  held out"),
    )


def choose_prompts(
    data: DataConfig, seed: int, held_out: Path | None
) -> tuple[list[Prompt], list[Prompt]]:
    """Training prompts as they are dealt, and validation prompts of other sources."""
    sources = [
        (load_prompts(source, data.max_bad_rows), source.weight) for source in data.prompts
    ]  # fmt: skip
    everything = [prompt for prompts, _ in sources for prompt in prompts]
    _, validation = split_by_source(everything, data.validation_conversations, seed)
    kept_out = {prompt.source for prompt in validation}
    sources = [([p for p in prompts if p.source not in kept_out], w) for prompts, w in sources]
    return deal_training_prompts(sources, data, seed, held_out), validation


def deal_training_prompts(
    sources: list[tuple[list[Prompt], float | None]],
    data: DataConfig,
    seed: int,
    held_out: Path | None,
) -> list[Prompt]:
    """The mixture of the sources, without copies of evaluation prompts.

    Raises:
        ValueError: nothing is left.
    """
    if held_out is not None:
        evaluation = load_prompts(held_out)
        cleaned = [(remove_contaminated(prompts, evaluation), w) for prompts, w in sources]
        for (_, found), source in zip((c for c, _ in cleaned), data.prompts, strict=True):
            print(f"{source.path} against {held_out}: {found.describe()}")
        sources = [(prompts, weight) for (prompts, _), weight in cleaned]
    if not any(prompts for prompts, _ in sources):
        raise ValueError(
            "no training prompts are left: all of them are held out or copies of evaluation prompts"
        )
    count = data.num_conversations or sum(len(prompts) for prompts, _ in sources)
    return deal(sources, count, seed)


def deal_sampling(data: DataConfig, tokens: TargetTokens, count: int) -> list[Sampling]:
    """`data.temperatures`, round robin."""
    ways = [tokens.own_sampling if t == "model" else Sampling(t) for t in data.temperatures]
    return [ways[i % len(ways)] for i in range(count)]


def split_documents(documents: Documents, held_out: int, seed: int) -> tuple[Documents, Documents]:
    """Hold out greedy documents such that no source is in both parts.

    Raises:
        ValueError: too few greedy documents or sources to hold that many out.
    """
    entries = documents.entries
    greedy = [entry for entry in entries if entry.temperature == 0]
    if not greedy:
        raise ValueError(
            "validation walks greedy text, and no conversation here was written at temperature 0: "
            "regenerate with 0 among data.temperatures"
        )
    _, chosen = split_by_source(greedy, held_out, seed)
    sources = {entry.source for entry in chosen}
    kept = [i for i, entry in enumerate(entries) if entry.source not in sources]
    validation = [i for i, e in enumerate(entries) if e.source in sources and e.temperature == 0]
    return Chosen(documents, kept), Chosen(documents, validation)


def _answered(
    target: Target, jobs: list[Job], data: DataConfig, seed: int, description: str
) -> Documents:
    extracted = not data.online
    settings = conversation_settings(jobs, target, data, seed, extracted)
    folder = _cache(data) / "conversations" / stable_hash(settings)
    regenerate(target, jobs, data, seed, folder, extracted, description)
    if extracted:
        return ActivationStore(folder, target)
    return OnlineActivations(target, read_folder(folder), data)


def without_contaminated(documents: Documents, target: Target, held_out: Path) -> Documents:
    """The documents whose prompt is no copy of an evaluation prompt; prints how many are."""
    asked = [
        Prompt(str(i), "", "", [{"role": "user", "content": text}], raw=True)
        for i, text in enumerate(
            target.tokenizer.decode(ids, skip_special_tokens=True) for ids in documents.prompts()
        )
    ]
    kept, found = remove_contaminated(asked, load_prompts(held_out))
    print(f"Conversations against {held_out}: {found.describe()}")
    return Chosen(documents, [int(prompt.id) for prompt in kept])


def _activations_of(target: Target, data: DataConfig) -> Documents:
    """Of the conversations of `headstart regenerate` that `data` names."""
    folder = data.conversations
    assert folder is not None
    check_tokenizer(folder, target)
    if data.online:
        return OnlineActivations(target, read_folder(folder), data)
    settings = [
        read_manifest(folder), target.fingerprint, str(target.table.dtype), data.teacher_top_k,
        data.storage, data.max_tokens,
    ]  # fmt: skip
    return extract_folder(
        target, folder, data, _cache(data) / "activations" / stable_hash(settings)
    )


def extract_folder(target: Target, folder: Path, data: DataConfig, out: Path) -> ActivationStore:
    """Extract the conversations of `headstart regenerate`, a part at a time."""
    parts = finished_parts(folder)
    count, tokens = count_tokens(parts)
    stream = (conversation for part in parts for conversation in read_part(part))
    return extract(target, stream, count, tokens, data, out)


def read_folder(folder: Path) -> list[Conversation]:
    """All conversations of `headstart regenerate`."""
    return [conversation for part in finished_parts(folder) for conversation in read_part(part)]


def check_tokenizer(folder: Path, tokens: TargetTokens) -> None:
    """Raise `ValueError`, naming both, where the ids of a folder mean something else."""
    manifest = read_manifest(folder)
    if manifest["tokenizer"] != tokens.tokenizer_hash:
        raise ValueError(
            f"{folder} was tokenised for {manifest['target']} ({manifest['tokenizer'][:12]}), and "
            f"{tokens.name} has another tokenizer ({tokens.tokenizer_hash[:12]}): regenerate it"
        )


def _cache(data: DataConfig) -> Path:
    return data.cache_dir or cache_dir()
