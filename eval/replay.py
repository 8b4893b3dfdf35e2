"""Greedy acceptance from stored activations, without decoding: `headstart simulate`.

Exact for greedy drafts on greedy text: a draft is right when it is the text's next token, and draft
k counts only when drafts 1..k-1 were right, so that the tokens fed to it are the text's own.

Letters: B documents, R rows of each, K rounds, S resamples, N drafts, C clusters, V vocabulary.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from transformers import PreTrainedModel

from headstart.common.console import counted, wide_console
from headstart.common.files import write_figures
from headstart.common.machine import environment
from headstart.common.processes import in_step
from headstart.configs.schema import DraftPositionOffset
from headstart.data.background import to_device
from headstart.data.documents import Document, Documents
from headstart.data.loader import candidate_rows, gather_rows
from headstart.data.store import ActivationStore, check_kept
from headstart.eval.acceptance import AcceptanceCounts, RecallCounts, replay_rounds, zero_counts
from headstart.eval.statistics import ends_in_loop, interval, resampled, with_interval
from headstart.heads.kernels import best_tokens
from headstart.heads.kinds import check_drafts, inputs_of, kind_of
from headstart.heads.pairing import check_pair
from headstart.heads.target import Target
from headstart.heads.unroll import DraftHead

LOGIT_ROWS = 256  # rows of V logits held at once
DOCUMENTS = 8  # run through the head together


@dataclass(frozen=True)
class Simulated:
    """What replaying held-out documents found."""

    by_length: tuple[AcceptanceCounts, ...]
    """Of the head as it drafts, through its clusters where it has ordered embeddings: in rounds of
    1 draft, of 2, up to K."""
    dense: AcceptanceCounts
    """Of the same head with the LM head over the whole vocabulary."""
    recall: RecallCounts
    """Over the drafts that a decoder meets from any row: those whose earlier ones in the round were
    right. Zero where the head has no ordered embeddings."""

    @property
    def acceptance(self) -> AcceptanceCounts:
        """In rounds of K drafts."""
        return self.by_length[-1]


@torch.no_grad()
def simulate_acceptance(
    head: DraftHead,
    target: Target,
    stored: Documents,
    rounds: int,
    which: Iterable[int],
    position: DraftPositionOffset = 0,
) -> Simulated:
    """Acceptance counts of `head` on the documents `which`, by replaying rounds.

    Args:
        head: in any mode.
        target: for its embeddings and table.
        stored: activations of greedy conversations.
        rounds: K.
        which: their indices (a process passes its share).
        position: where drafts stand.
    """
    by_length = [zero_counts(k) for k in range(1, rounds + 1)]
    dense, recall = zero_counts(rounds), RecallCounts()
    chosen = [i for i in which if stored.entries[i].trained >= 2]
    chunks = (chosen[start : start + DOCUMENTS] for start in range(0, len(chosen), DOCUMENTS))
    for chunk in in_step(chunks, target.sharded):
        if not (documents := stored.read(chunk or [])):
            continue
        answers, met = judge_drafts(head, target, documents, rounds, position)
        recall += met
        for answer in answers:
            # What a draft is does not depend on how many come after it.
            by_length = [
                counts + replay_rounds(answer.right[:, :k], answer.counted[:, :k])
                for k, counts in enumerate(by_length, start=1)
            ]
            dense += replay_rounds(answer.dense_right, answer.dense_counted)
    return Simulated(tuple(by_length), dense, recall)


@dataclass(frozen=True)
class JudgedAnswer:
    """One answer of a document, and the drafts from each of its rows, one row after another; of a
    draft that comes after a wrong one in its round nothing is known."""

    document: Document
    rows: torch.Tensor
    """[R] positions t; draft k of one is to be token t + 1 + k."""
    right: torch.Tensor
    """[R, K] bool: the draft is the text's token."""
    counted: torch.Tensor
    """[R, K] bool: a decoder would make it."""
    dense_right: torch.Tensor
    """`right` with the LM head over the whole vocabulary."""
    dense_counted: torch.Tensor
    """`counted` likewise."""


@torch.no_grad()
def judge_drafts(
    head: DraftHead,
    target: Target,
    documents: Sequence[Document],
    rounds: int,
    position: DraftPositionOffset = 0,
) -> tuple[list[JudgedAnswer], RecallCounts]:
    """Draft from every row of some greedy documents; arguments as `simulate_acceptance`.

    Returns:
        Their answers in order, and the recall of the clusters over the drafts that a decoder meets.
    """
    rows = [candidate_rows(d) for d in documents]
    batch = gather_rows(list(documents), rows, rounds, inputs=head.inputs)
    wanted = torch.zeros_like(batch.rows.tokens)
    judged = batch.weights.bool()
    ends = torch.zeros_like(judged)
    for b, (document, r) in enumerate(zip(documents, rows, strict=True)):
        following, last = r[:, None] + torch.arange(2, rounds + 2), len(document.ids) - 1
        wanted[b, : len(r)] = document.ids[following.clamp_max(last)]
        # The last token before a text is cut is the target's own: nobody drafts it.
        if int(document.ids[last]) in target.eos_ids:
            ends[b, : len(r)] = following == last
        else:
            judged[b, : len(r)] &= following != last
    batch, wanted, there = to_device((batch, wanted, judged), target.device)
    states = torch.stack(
        head(batch.texts.computed_in(head.dtype), batch.rows, target.embed, position), dim=2
    )  # [B, R, K, width of `draft_table`]
    matches = _matches(head, target, states, wanted, there)
    recall = RecallCounts()
    if head.cluster_of is not None:
        met = there.clone()
        met[..., 1:] &= matches[0][..., :-1].long().cumprod(-1).bool()
        scores = head.assistant.masked_embedding.centroids(states[met])
        clusters = head.cluster_of[batch.teacher_ids[met]]
        recall = RecallCounts.of(scores, clusters, batch.teacher_logprobs[met])
    # As of a decoder: after a right draft that ends the text no token of the target's comes.
    found, dense = (m.cpu() for m in matches)
    kinds = [found, judged & ~(ends & found), dense, judged & ~(ends & dense)]
    answers = []
    for b, (document, r) in enumerate(zip(documents, rows, strict=True)):
        # Each answer of a conversation, where rows follow one another, is replayed by itself.
        breaks = ((r[1:] - r[:-1]) != 1).nonzero()[:, 0] + 1
        for start, end in pairwise([0, *breaks.tolist(), len(r)]):
            own = [each[b, start:end] for each in kinds]
            answers.append(JudgedAnswer(document, r[start:end], *own))
    return answers, recall


def _matches(
    head: DraftHead,
    target: Target,
    states: torch.Tensor,
    wanted: torch.Tensor,
    judged: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each draft is the token `wanted` there, given that the earlier ones are.

    Returns:
        [B, R, K] bool as the head drafts, and [B, R, K] with the dense LM head.
    """
    drafted, dense = (torch.zeros_like(wanted, dtype=torch.bool) for _ in range(2))
    alive_drafted = alive_dense = judged[..., 0]
    for k in range(wanted.shape[-1]):
        # A draft after a miss is never looked at: no need for its logits over the vocabulary.
        at = ((alive_drafted | alive_dense) & judged[..., k]).nonzero(as_tuple=True)
        pair = _drafts(head, target, states[..., k, :][at])
        drafted[..., k][at], dense[..., k][at] = (ids == wanted[..., k][at] for ids in pair)
        alive_drafted = alive_drafted & drafted[..., k]
        alive_dense = alive_dense & dense[..., k]
    return drafted, dense


def _drafts(
    head: DraftHead, target: Target, states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[N] tokens through the clusters and [N] over the whole vocabulary, of states [N, width]."""
    dense = torch.zeros(len(states), dtype=torch.long, device=states.device)
    drafted = dense.clone()
    embedder, cluster_of = head.assistant.masked_embedding, head.cluster_of
    table = head.draft_table(target.table)
    for start in range(0, len(states), LOGIT_ROWS):
        rows = slice(start, start + LOGIT_ROWS)
        logits = states[rows].to(table.dtype) @ table.T
        dense[rows] = drafted[rows] = best_tokens(logits)
        if embedder is None or cluster_of is None:
            continue
        scores = embedder.centroids(states[rows])
        top = scores.topk(embedder.centroid_intermediate_top_k, dim=1).indices
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, top, True)
        # Where the best token is in a chosen cluster it is the draft too; the rest look again.
        missed = ~chosen.gather(1, cluster_of[dense[rows]][:, None])[:, 0]
        hidden = ~chosen[missed][:, cluster_of]
        drafted[rows][missed] = best_tokens(logits[missed].masked_fill(hidden, -torch.inf))
    return drafted, dense


@dataclass(frozen=True)
class ReplayedText:
    """One text, and the counts of the rounds replayed over it."""

    id: str
    category: str
    counts: AcceptanceCounts
    loops: bool | None
    """Whether what the target wrote ends in a loop, which flatters drafts of any kind. None: not
    known, of a text that an earlier version replayed."""

    @classmethod
    def read(cls, row: dict[str, Any]) -> "ReplayedText":
        """Of what `row` gave."""
        reached, accepted = tuple(row["reached"]), tuple(row["accepted"])
        counts = AcceptanceCounts(row["rounds"], row["drafted"], reached, accepted)
        return cls(row["id"], row["category"], counts, row.get("loops"))

    def row(self) -> dict[str, Any]:
        """For JSON."""
        own = {"id": self.id, "category": self.category, "loops": self.loops}
        return own | asdict(self.counts)


def replay_texts(
    head: DraftHead,
    target: Target,
    stores: Mapping[str, ActivationStore],
    lengths: Sequence[int],
    doing: str,
    positions: Mapping[str, DraftPositionOffset],
    greedy: bool = False,
) -> dict[str, dict[int, list[ReplayedText]]]:
    """Replay rounds over every text of some stores; returns, by the name of a store and K, the
    texts in which there was a round.

    Args:
        head: in any mode.
        target: that wrote the texts.
        stores: name -> texts.
        lengths: draft lengths K, all replayed at once.
        doing: label of the progress bar.
        positions: name -> where drafts stand there.
        greedy: leave out the texts that were sampled, or that the target did not write.
    """
    found = {name: {k: list[ReplayedText]() for k in lengths} for name in stores}
    texts = [
        (name, i, entry)
        for name, store in stores.items()
        for i, entry in enumerate(store.entries)
        if not greedy or entry.temperature == 0  # None: it wrote no such text
    ]
    for name, i, entry in counted(texts, f"{doing} (texts)"):
        simulated = simulate_acceptance(
            head, target, stores[name], max(lengths), [i], positions[name]
        )
        if simulated.acceptance.rounds:
            [text] = stores[name].read([i])
            loops = ends_in_loop(text.ids[text.loss_mask].tolist())
            for k, own in found[name].items():
                counts = simulated.by_length[k - 1]
                own.append(ReplayedText(entry.id, entry.category, counts, loops))
    return found


def length_draws(texts: Sequence[ReplayedText]) -> np.ndarray:
    """[1 + S] acceptance length: as it is, then over texts drawn anew; texts with the same ids in
    the same order are drawn alike."""
    counts = [[text.counts.rounds, sum(text.counts.accepted)] for text in texts]
    sums = resampled([text.id for text in texts], counts)
    lengths: np.ndarray = 1 + sums[:, 1] / np.maximum(sums[:, 0], 1)
    return lengths


def total_counts(texts: Sequence[ReplayedText]) -> AcceptanceCounts:
    """Of all texts together."""
    k = len(texts[0].counts.accepted)
    return sum((text.counts for text in texts), zero_counts(k))


def by_category(texts: Sequence[ReplayedText]) -> dict[str, list[ReplayedText]]:
    """The texts of each category, by name."""
    categories = sorted({text.category for text in texts})
    return {name: [text for text in texts if text.category == name] for name in categories}


def describe_replayed(texts: Sequence[ReplayedText]) -> dict[str, Any]:
    """Acceptance length with its 95% interval, without looping texts (None: all loop), conditional
    acceptance, and each category's."""
    straight = [text for text in texts if not text.loops]
    total, draws = total_counts(texts), length_draws(texts)
    without = total_counts(straight).acceptance_length if straight else None
    return {
        "acceptance_length": float(draws[0]),
        "acceptance_length_interval": interval(draws),
        "looping_share": 1 - len(straight) / len(texts),
        "acceptance_length_without_loops": without,
        "conditional_acceptance_rate": total.conditional_acceptance_rate,
        "texts": len(texts),
        "rounds": total.rounds,
        "categories": {
            name: {"acceptance_length": total_counts(own).acceptance_length, "texts": len(own)}
            for name, own in by_category(texts).items()
        },
    }


def run_estimate(
    target: Target,
    heads: Mapping[str, PreTrainedModel],
    store: Path,
    num_assistant_tokens: Sequence[int],
    out: Path,
    position: DraftPositionOffset = 0,
) -> dict[str, Any]:
    """Replay rounds over the greedy texts of a store; print a table, write `out/estimate.json` and
    return what it holds.

    Args:
        target: that of the store, for its embeddings and table; it runs over no text.
        heads: name -> head in the native format.
        store: folder of `headstart extract`.
        num_assistant_tokens: draft lengths K.
        out: folder.
        position: RoPE position of the drafts: 0, where transformers puts them, or -1, where vLLM
            does.

    Raises:
        ValueError: no head is named, a head or the store does not fit the target, or no text of it
            is greedy.
    """
    if not heads:
        raise ValueError("simulate replays heads: name the folder or Hub id of one or more")
    stored = ActivationStore(store, target)
    for head in heads.values():
        check_pair(target, head)
        check_kept(stored.index, inputs_of(head.config), store)
        check_drafts(head.config, num_assistant_tokens, "eval.num_assistant_tokens")
    if position and not any(kind_of(head.config).has_position for head in heads.values()):
        raise ValueError(
            f"simulate.draft_position_offset={position}: drafts of these heads stand at no "
            "position, leave it out"
        )
    at = {"texts": position}
    found: list[dict[str, Any]] = []
    first: dict[int, list[ReplayedText]] = {}
    for name, assistant in heads.items():
        by_length = replay_texts(
            DraftHead(assistant), target, {"texts": stored}, num_assistant_tokens,
            f"Replaying {name}", positions=at, greedy=True,
        )["texts"]  # fmt: skip
        for k, replayed in by_length.items():
            if not replayed:
                raise ValueError(
                    f"{store} holds no greedy text of the target: make one with `headstart "
                    "extract data.temperatures=0`"
                )
            beside = first.setdefault(k, replayed)
            for category, texts in {"all": replayed, **by_category(replayed)}.items():
                result = {"head": name, "num_assistant_tokens": k, "category": category}
                compared = beside if category == "all" and beside is not replayed else None
                found.append(result | _result(texts, compared))
    where = {
        "target": target.name, "store": store.resolve().name, "texts": len(replayed),
        "draft_position_offset": position,
    }  # fmt: skip
    content = {
        "estimate": 1,
        "environment": environment(target.device) | where,
        "results": found,
    }
    out.mkdir(parents=True, exist_ok=True)
    print_estimate(content)
    write_figures(content, out / "estimate.json")
    return content


def _result(texts: list[ReplayedText], beside: list[ReplayedText] | None) -> dict[str, Any]:
    """Of some texts; beside those of the first head, with the interval of the difference."""
    counts, draws = total_counts(texts), length_draws(texts)
    result: dict[str, Any] = {
        "acceptance_length": counts.acceptance_length,
        "acceptance_length_interval": list(interval(draws)),
        "acceptance_rate": counts.acceptance_rate,
        "conditional_acceptance_rate": counts.conditional_acceptance_rate,
        "rounds": counts.rounds,
        "drafted": counts.drafted,
        "accepted": list(counts.accepted),
        "difference": None,
        "difference_interval": None,
    }
    if beside is not None:
        assert [text.id for text in texts] == [text.id for text in beside]
        difference = draws - length_draws(beside)
        result["difference"] = float(difference[0])
        result["difference_interval"] = list(interval(difference))
    return result


def print_estimate(content: dict[str, Any]) -> None:
    """Print the results as a table."""
    where = content["environment"]
    table = Table(
        "head", "K", "category", "rounds", "acceptance length (95%)", "a_1 .. a_K",
        "beside the first head (95%)",
        title=f"{where['texts']} greedy texts of {where['target']}, simulated",
    )  # fmt: skip
    for r in content["results"]:
        rates = ", ".join(f"{a:.2f}" for a in r["conditional_acceptance_rate"])
        cells = [r["head"], str(r["num_assistant_tokens"]), r["category"], str(r["rounds"])]
        low, high = r["acceptance_length_interval"]
        cells += [f"{r['acceptance_length']:.3f} ({low:.2f} to {high:.2f})", rates]
        if r["difference"] is not None:
            cells.append(with_interval(r["difference"], r["difference_interval"], "+.3f"))
        table.add_row(*cells)
    wide_console().print(table)
