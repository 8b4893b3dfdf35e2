"""One round of drafting with a head of any kind: what the kind's `DraftState` says of each draft
becomes a token.

Of a head with ordered embeddings the logits of some thousand tokens are computed, and not of the
whole vocabulary. Unless somebody asks for confidences, the host waits for the device once a round.

Letters: D target width, H head width, V vocabulary, C clusters, M tokens looked at.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from headstart.heads.cpu_linear import forms_of, linear_by
from headstart.heads.kinds import DraftState, kind_of

WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
"""What shapes a distribution whatever the text is."""


@dataclass(frozen=True)
class Drafts:
    """The drafts of one round."""

    tokens: list[int]
    confidences: list[float]
    """Probability of each in what it was chosen from; empty where nobody asked."""
    logits: torch.Tensor | None = None
    """[K, V] of what each was drawn from, minus infinity where it could not be; None: argmaxes."""
    on_device: torch.Tensor | None = None
    """[K] the tokens on the head's device; None: they were not drafted there."""


class Drafter:
    """Drafts with one head, with a table of its own (`load_assistant`), and the target's input
    embeddings, which scale."""

    def __init__(self, assistant: Any, embed: nn.Module):
        self.assistant, self.embed_tokens = assistant, embed
        self.kind = kind_of(assistant.config)
        self.inputs = self.kind.inputs(assistant.config)
        """What it reads of the target."""
        self.most = self.kind.most_drafts(assistant.config)
        """K at most; None: any number."""
        embedder = assistant.masked_embedding if assistant.config.use_ordered_embeddings else None
        self.embedder = embedder
        self.forms = forms_of(assistant.lm_head.weight)
        self.members = None  # [C, tokens a cluster]
        if embedder is not None:
            self.members = embedder.token_ordering.long().view(embedder.num_centroids, -1)

    def new_text(self, padding: int = 0, offset: int = 0) -> DraftState:
        """What drafting along a text begins with, whose prompt has so many tokens of padding at its
        left; `offset` as of `HeadKind.draft_state`."""
        return self.kind.draft_state(self.assistant, self._embed, padding, offset)

    def _embed(self, token: torch.Tensor) -> torch.Tensor:
        table = self.assistant.lm_head.weight
        source = next(self.embed_tokens.parameters()).device  # a target and its head may be apart
        return self.embed_tokens(token.to(source)).to(table.device, table.dtype)

    @torch.no_grad()
    def draft(
        self,
        token: torch.Tensor,
        state: DraftState,
        limit: int,
        stops_after: frozenset[int],
        goes_on: Callable[[list[float]], bool] | None,
        processors: Sequence[LogitsProcessor] = (),
        sample: bool = False,
        text: torch.Tensor | None = None,
    ) -> Drafts:
        """Draft up to `limit` tokens, at least one.

        Args:
            token: [1, 1] the newest token, on which the target has not run.
            state: from `new_text`, which has seen all tokens before `token`.
            limit: K at most.
            stops_after: tokens that end a text, and so a draft.
            goes_on: asked after each draft, with the confidences so far; None: to the limit, and
                the draft is cut after one of `stops_after` at the end.
            processors: shape what the head says of each draft.
            sample: draw each draft from the head's distribution; False: take its best token.
            text: [1, n] tokens so far, which the processors are to see with the drafts before each;
                None: all of them are `WARPERS`.
        """
        tokens: list[torch.Tensor] = []
        confidences: list[float] = []
        drawn_from: list[torch.Tensor] = []
        state.begin()
        for _ in range(limit):
            hidden = state.step(token)[0, 0]
            if text is not None:
                logits, ids = self._after(text, hidden, processors), None
            else:
                logits, ids = self._logits(hidden)
                if sample or processors:
                    logits = _processed(logits, processors)
            # `best` [1], and `index_select`: an index without a dimension is read by the host.
            best = _drawn(logits) if sample else logits.argmax(-1, keepdim=True)
            if sample:
                drawn_from.append(logits if ids is None else self._spread(logits, ids))
            token = (best if ids is None else ids.index_select(0, best)).view(1, 1)
            tokens.append(token[0])
            if text is not None:
                text = torch.cat([text, token.to(text.device)], dim=1)
            if goes_on is not None:
                chosen = logits.index_select(0, best)
                confidences.append(float((chosen - logits.logsumexp(-1)).exp()))
                if int(token) in stops_after or not goes_on(confidences):
                    break
        drafted = torch.cat(tokens)
        found = drafted.tolist()
        kept = next((k for k, one in enumerate(found, 1) if one in stops_after), len(found))
        scores = torch.stack(drawn_from[:kept]) if drawn_from else None
        return Drafts(found[:kept], confidences, scores, drafted[:kept])

    def _after(
        self, text: torch.Tensor, state: torch.Tensor, processors: Sequence[LogitsProcessor]
    ) -> torch.Tensor:
        """Logits [V] for a state [H], as processors leave them that read the text [1, n]."""
        logits, ids = self._logits(state)
        if ids is not None:
            scores = _processed(self._spread(logits, ids), processors, text)
            # Of minus infinity some make what is no number.
            scores = scores.masked_fill(scores.isnan(), -torch.inf)
            if scores.max() > -torch.inf:
                return scores
            # None of the tokens looked at may follow: one of the others does.
            logits = self._products(self.assistant.lm_head.weight, state)
        return _processed(logits, processors, text)

    def _spread(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Logits [M] of tokens [M] as [V], minus infinity elsewhere."""
        whole = logits.new_full((len(self.assistant.lm_head.weight),), -torch.inf)
        whole[ids] = logits
        return whole

    def _logits(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits [M] of the tokens [M] looked at for a state [H]; None: the whole vocabulary."""
        table = self.assistant.lm_head.weight
        if self.embedder is None or self.members is None:
            return self._products(table, state), None
        best = self.embedder.centroids(state).topk(self.embedder.centroid_intermediate_top_k)
        ids = self.members[best.indices].flatten()
        return self._products(table.index_select(0, ids), state), ids

    def _products(self, table: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """[M, H] @ [H] -> [M], as a linear layer: in bfloat16 on a CPU `@` takes half as long
        again."""
        return linear_by(self.forms, table, None, state[None])[0]


def _drawn(logits: torch.Tensor) -> torch.Tensor:
    """[1] the place in logits [M] of a token drawn from their softmax. What `torch.multinomial`
    does, and draws alike, without its checks, for which the host waits."""
    likely = logits.softmax(-1)
    return (likely / torch.empty_like(likely).exponential_()).argmax(-1, keepdim=True)


def _processed(
    logits: torch.Tensor, processors: Sequence[LogitsProcessor], text: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits [M] in float32, as the processors leave them after the text [1, n]; None: they read
    none."""
    seen = torch.empty(1, 0, dtype=torch.long) if text is None else text
    # Their tensors lie where the target's are, a head may lie elsewhere.
    scores = logits.float()[None] if text is None else logits.float()[None].to(text.device)
    for processor in processors:
        scores = processor(seen, scores)
    return scores[0].to(logits.device)
