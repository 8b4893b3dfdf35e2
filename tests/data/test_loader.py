"""Batches: which rows, what they are paired with, and that packing changes nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.configs.schema import DataConfig, HeadConfig
from headstart.data.conversations import Conversation, answered, cut
from headstart.data.extraction import OnlineActivations
from headstart.data.loader import AnchorLoader, Batch, candidate_rows, gather_rows, pack
from headstart.heads.kinds import head_kinds
from headstart.heads.pairing import build_assistant
from headstart.heads.target import Target
from headstart.heads.unroll import DraftHead
from headstart.train.losses import exact_losses, forward_kl
from headstart.train.step import draft_batch
from tests.helpers.models import make_target
from tests.helpers.prompts import conversations

CONFIG = DataConfig(teacher_top_k=5)


@pytest.fixture(scope="module")
def documents() -> OnlineActivations:
    return OnlineActivations(make_target("gemma4-kv-sharing"), conversations(11), CONFIG)


def test_rows_pair_each_token_with_the_hidden_state_before_it(
    documents: OnlineActivations,
) -> None:
    """By hand, for one document: row t reads h_t and x_{t+1}, round k is taught at t + k."""
    (document,) = documents.read([2])  # 5 prompt tokens, 18 in all
    rows = candidate_rows(document)
    assert rows.tolist() == list(range(4, 16)), "x_5 is the first token that the target wrote"
    batch = gather_rows([document], [rows], rounds=3)
    for r, t in enumerate(rows.tolist()):
        assert batch.rows.at[0, r] == t
        hidden = batch.texts.hidden.rows()[0, batch.rows.hidden[0, r]]
        assert torch.equal(hidden, document.hidden[t])
        for k in (1, 2, 3):
            if t + k + 1 >= 18:
                assert batch.weights[0, r, k - 1] == 0, "nothing follows to be predicted"
                continue
            assert batch.weights[0, r, k - 1] == 1
            assert batch.rows.tokens[0, r, k - 1] == document.ids[t + k]
            assert torch.equal(batch.teacher_ids[0, r, k - 1], document.teacher_ids[t + k].long())


def test_each_answer_of_a_conversation_is_drafted_by_itself(tiny: Target) -> None:
    """Answers are tokens 4-8 and 12-14: no draft begins in, or reaches over, the user's turn."""
    ids = torch.randint(4, 260, (17,), generator=torch.Generator().manual_seed(1)).tolist()
    conversation = Conversation("c", "c", "s", ids, [(4, 9), (12, 15)])
    (document,) = OnlineActivations(tiny, [conversation], CONFIG).read([0])
    rows = candidate_rows(document)
    assert rows.tolist() == [3, 4, 5, 6, 11, 12]
    weights = gather_rows([document], [rows], rounds=3).weights[0].tolist()
    assert weights == [[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 0, 0]]


def test_no_draft_counts_after_a_gap_in_what_the_target_wrote(tiny: Target) -> None:
    """Answers are tokens 4-6 and 8-11: a draft past token 7 would be of another answer."""
    ids = torch.randint(4, 260, (12,), generator=torch.Generator().manual_seed(1)).tolist()
    conversation = Conversation("c", "c", "s", ids, [(4, 7), (8, 12)])
    (document,) = OnlineActivations(tiny, [conversation], CONFIG).read([0])
    rows = candidate_rows(document)
    assert rows.tolist() == [3, 4, 7, 8, 9]
    weights = gather_rows([document], [rows], rounds=4).weights[0].tolist()
    assert weights == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]


def test_an_epoch_reads_every_conversation_once_over_all_processes(
    documents: OnlineActivations,
) -> None:
    seen: list[str] = []
    for rank in range(2):
        loader = AnchorLoader(documents, 1, 4, 2, seed=5, rank=rank, world_size=2)
        seen += [d for n in range(5) for (d,) in loader.batch(n).document_ids]
    assert len(seen) == len(set(seen)) == 10
    halves = [
        AnchorLoader(documents, 2, 4, 2, 5, rank=r, world_size=2).batch(1).document_ids
        for r in (0, 1)
    ]
    whole = AnchorLoader(documents, 4, 4, 2, seed=5).batch(1)
    assert [*halves[0], *halves[1]] == whole.document_ids


def test_a_batch_depends_on_its_number_alone(documents: OnlineActivations) -> None:
    first = AnchorLoader(documents, 3, 4, 2, seed=5)
    for n in range(3):
        first.batch(n)
    again, other = AnchorLoader(documents, 3, 4, 2, seed=5).batch(3), first.batch(4)
    assert torch.equal(first.batch(3).rows.at, again.rows.at)
    assert torch.equal(first.batch(3).texts.hidden.rows(), again.texts.hidden.rows())
    assert not torch.equal(other.rows.tokens, again.rows.tokens)


def losses_by_token(
    target: Target, head: DraftHead, batch: Batch
) -> dict[tuple[float, ...], list[float]]:
    """(first values of h_t) -> the loss of each round of that row, over the whole vocabulary."""
    drafts = draft_batch(head, target, batch, torch.float32, 0)
    how = (forward_kl, 1.0, torch.float32, target.table)
    said = exact_losses(drafts.states, target, drafts.teacher, *how)
    losses = torch.zeros(batch.weights[..., 0].numel(), batch.weights.shape[-1])
    losses[batch.drafts.anchor, batch.drafts.round] = said.losses.detach()
    losses = losses.view(batch.weights.shape)
    found = {}
    for b, r in batch.weights[..., 0].nonzero().tolist():
        kept = batch.weights[b, r].bool()
        state = batch.texts.hidden.rows()[b, batch.rows.hidden[b, r], :4]
        found[tuple(state.tolist())] = losses[b, r][kept].tolist()
    return found


@torch.no_grad()
@pytest.mark.parametrize("capacity", [30, 64, 1000])
@pytest.mark.parametrize("kind", head_kinds())
def test_packed_and_unpacked_rows_have_the_same_loss(
    target: Target, kind: str, capacity: int
) -> None:
    """Documents reach beyond the sliding window of 8; a row that saw its neighbor would differ."""
    torch.manual_seed(0)
    head = DraftHead(build_assistant(target, HeadConfig(kind=kind, init_from="random")))
    documents = OnlineActivations(target, conversations(9), CONFIG, head.inputs).read(range(9))
    rows = [candidate_rows(d) for d in documents]
    alone = losses_by_token(target, head, gather_rows(documents, rows, 3, inputs=head.inputs))
    batch = gather_rows(documents, rows, 3, capacity, inputs=head.inputs)
    assert len(batch.weights) < 9
    packed = losses_by_token(target, head, batch)
    assert packed.keys() == alone.keys()
    for key, values in alone.items():
        assert packed[key] == pytest.approx(values, abs=1e-5)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 60))
def test_packing_keeps_every_document_and_never_overfills_a_row(
    lengths: list[int], capacity: int
) -> None:
    rows = pack(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    for row in rows:
        assert len(row) == 1 or sum(lengths[i] for i in row) <= capacity
    # First fit leaves at most one row less than half full.
    assert sum(2 * sum(lengths[i] for i in row) <= capacity for row in rows) <= 1


@st.composite
def masked_conversations(draw: st.DrawFn) -> Conversation:
    turns = draw(st.lists(st.integers(1, 30), min_size=2, max_size=8))
    spans, at = [], 0
    for number, length in enumerate(turns):
        if number % 2:
            spans.append((at, at + length))
        at += length
    return Conversation("c", "c", "s", list(range(at)), spans)  # each id is its position


def drafted(conversation: Conversation) -> list[int]:
    """Positions that some row drafts in its first round."""
    return [i for a, b in conversation.spans for i in conversation.ids[a + 1 : b]]


@settings(max_examples=300)
@given(masked_conversations(), st.integers(8, 40))
def test_a_cut_conversation_trains_every_token_once_with_context_before_it(
    conversation: Conversation, max_tokens: int
) -> None:
    pieces = cut(conversation, max_tokens)
    assert sorted(i for piece in pieces for i in drafted(piece)) == drafted(conversation)
    for number, piece in enumerate(pieces):
        assert len(piece.ids) <= max_tokens
        body = piece.ids[1:] if number or piece.ids[:2] != [0, 1] else piece.ids
        assert piece.ids[0] == 0, "every piece begins with <bos>"
        assert body == list(range(body[0], body[-1] + 1))
        if body[0] > 1:
            first = min(drafted(piece))
            assert first - body[0] >= max_tokens // 2 - 1
    assert len({piece.id for piece in pieces}) == len(pieces)


def test_a_short_conversation_is_not_touched() -> None:
    conversation = answered([1, 2, 3], [4, 5], id="c", category="c", source="s")
    assert cut(conversation, 8) == [conversation]


@pytest.mark.parametrize("max_packed_length", [None, 64])
def test_every_draft_is_taught_by_the_target_at_its_own_place(
    documents: OnlineActivations, max_packed_length: int | None
) -> None:
    """Unequal lengths, packed or not, with fewer anchors beyond the first round: the teacher's
    states are those of KV row t + k, and no draft comes twice or is missing."""
    target = documents.target
    loader = AnchorLoader(
        documents, 6, 9, 3, seed=2, max_packed_length=max_packed_length, multi_step_anchors=4
    )
    batch = loader.batch(0)
    head = DraftHead(build_assistant(target, HeadConfig()))
    drafts = draft_batch(head, target, batch, torch.float32, 0)
    said = target.logits(drafts.teacher.hidden[drafts.teacher.at])
    assert torch.equal(said.argmax(-1), drafts.teacher.ids[:, 0])
    torch.testing.assert_close(
        said.log_softmax(-1).gather(1, drafts.teacher.ids), drafts.teacher.logprobs,
        atol=1e-4, rtol=1e-4,
    )  # fmt: skip
    rounds = batch.weights.shape[-1]
    wanted = batch.weights.flatten().nonzero()[:, 0].tolist()
    assert sorted((batch.drafts.anchor * rounds + batch.drafts.round).tolist()) == wanted
    first, later = (int((batch.drafts.round == k).sum()) for k in (0, 1))
    assert later < first
    assert later <= 6 * 4
    # And the states are those of the anchors that they are said to be of.
    b, r, _ = batch.weights.shape
    everything = batch.rows._replace(multi_step=torch.arange(r).expand(b, r))
    with torch.no_grad():
        texts = batch.texts.computed_in(torch.float32)
        whole = head(texts, everything, target.embed, 0)
    for k in range(rounds):
        of_round = batch.drafts.round == k
        torch.testing.assert_close(
            drafts.states[of_round].detach(),
            whole[k].flatten(0, 1)[batch.drafts.anchor[of_round]],
            atol=1e-5, rtol=1e-5,
        )  # fmt: skip
