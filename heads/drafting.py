"""One round of drafting, lean: what does not change within the round is computed once.

Same layers, same arithmetic as `Gemma4AssistantForCausalLM.forward` of transformers 5.20 to 5.24,
without what that forward does anew for every draft: masks (one row sees all the KV that it is
given), rotary embeddings (the position stays), and logits over the whole vocabulary of which a head
with ordered embeddings looks at some thousand. Unless somebody asks for confidences, the host waits
for the device once a round.

Letters: T rows of KV, D target width, H head width, V vocabulary, C clusters, M tokens looked at.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessor

from headstart.heads.kernels import quick_rows, small_batch_linear
from headstart.heads.saving import Assistant
from headstart.heads.target import SharedKV


class CleanKV:
    """The target's keys and values as the head saw them in training, kept from round to round.

    What the target hands out ends with the rows of rejected drafts, and begins past the sliding
    window one row late where a round accepted nothing (docs/upstream.md). Here the rejected rows
    are cut off, and of the sliding rows as many are kept as a training row sees:
    `sliding_window + 1`.

    Args:
        sliding_window: of the head.
        padding: tokens of padding at the left of the prompt, which no head sees.
    """

    def __init__(self, sliding_window: int, padding: int = 0):
        self.sliding_rows = sliding_window + 1
        self.padding = padding
        self.rows = 0
        """T, without padding."""
        self.shared: SharedKV = {}
        """Layer type -> (keys, values), each [1, kv heads, rows, head_dim], of valid rows alone."""

    def take(self, shared_kv: Any, given: int, valid: int) -> None:
        """Take the rows of one target forward.

        Args:
            shared_kv: `shared_kv_states` of its output.
            given: tokens that the forward was given; its newest rows are theirs.
            valid: how many of them, from the first on, belong to the text.
        """
        ends = {t: keys.shape[2] - given + valid for t, (keys, _) in shared_kv.items()}
        self.rows = ends["full_attention"] - self.padding
        for layer_type, pair in shared_kv.items():
            end = ends[layer_type]
            if layer_type == "full_attention":
                rows = [tensor[:, :, self.padding : end] for tensor in pair]
            elif (kept := min(self.rows, self.sliding_rows)) <= valid or not self.shared:
                rows = [tensor[:, :, max(0, end - kept) : end] for tensor in pair]
            else:
                older = [tensor[:, :, valid - kept :] for tensor in self.shared[layer_type]]
                newer = [tensor[:, :, end - valid : end] for tensor in pair]
                rows = [torch.cat(both, dim=2) for both in zip(older, newer, strict=True)]
            self.shared[layer_type] = (rows[0], rows[1])


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
    """Drafts with one head in the native format, with a table of its own (`load_assistant`), and
    the target's input embeddings, which scale."""

    def __init__(self, assistant: Assistant, embed: nn.Module):
        self.assistant, self.embed = assistant, embed
        types = assistant.config.text_config.layer_types
        self.layers = list(zip(types, assistant.model.layers, strict=True))
        embedder = assistant.masked_embedding if assistant.config.use_ordered_embeddings else None
        self.embedder = embedder
        table = assistant.lm_head.weight
        self.quick = quick_rows(table.dtype) if table.device.type == "cpu" else frozenset[int]()
        self.members = None  # [C, tokens a cluster]
        if embedder is not None:
            self.members = embedder.token_ordering.long().view(embedder.num_centroids, -1)

    @torch.no_grad()
    def draft(
        self,
        token: torch.Tensor,
        hidden: torch.Tensor,
        kv: CleanKV,
        limit: int,
        stops_after: frozenset[int],
        goes_on: Callable[[list[float]], bool] | None,
        warpers: Sequence[LogitsProcessor] | None = None,
        offset: int = 0,
    ) -> Drafts:
        """Draft up to `limit` tokens, at least one.

        Args:
            token: [1, 1] the newest token, on which the target has not run.
            hidden: [1, 1, D] the target's post-norm hidden state of the token before it.
            kv: of all tokens before `token`.
            limit: K at most.
            stops_after: tokens that end a text, and so a draft.
            goes_on: asked after each draft, with the confidences so far; None: to the limit, and
                the draft is cut after one of `stops_after` at the end.
            warpers: draw each draft from the head's distribution, shaped by these, none of which
                reads the tokens so far; None: take its best token.
            offset: of the drafts' position from that of `token`.
        """
        assistant = self.assistant
        own = assistant.pre_projection.weight
        device, dtype = own.device, own.dtype
        source = next(self.embed.parameters()).device  # a target and its head may be apart
        shared = {t: (k.to(device, dtype), v.to(device, dtype)) for t, (k, v) in kv.shared.items()}
        # Unlike `tensor`, without a wait.
        position = torch.full((1, 1), kv.rows + offset, device=device)
        hidden = hidden.to(device, dtype)
        rotary = {t: assistant.model.rotary_emb(hidden, position, t) for t in kv.shared}
        tokens: list[torch.Tensor] = []
        confidences: list[float] = []
        drawn_from: list[torch.Tensor] = []
        state: torch.Tensor | None = None
        for _ in range(limit):
            hidden = hidden if state is None else assistant.post_projection(state)
            embedded = self.embed(token.to(source)).to(device, dtype)
            state = assistant.pre_projection(torch.cat([embedded, hidden], dim=-1))
            for layer_type, layer in self.layers:
                state = layer(
                    state, shared_kv_states=shared, position_embeddings=rotary[layer_type],
                    attention_mask=None,
                )  # fmt: skip
            state = assistant.model.norm(state)
            logits, ids = self._logits(state[0, 0])
            # `best` [1], and `index_select`: an index without a dimension is read by the host.
            if warpers is None:
                best = logits.argmax(-1, keepdim=True)
            else:
                logits = _warped(logits, warpers)
                best = _drawn(logits)
                drawn_from.append(logits if ids is None else self._spread(logits, ids))
            token = (best if ids is None else ids.index_select(0, best)).view(1, 1)
            tokens.append(token[0])
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
        return small_batch_linear(self.quick, table, None, state[None])[0]


def _drawn(logits: torch.Tensor) -> torch.Tensor:
    """[1] the place in logits [M] of a token drawn from their softmax. What `torch.multinomial`
    does, and draws alike, without its checks, for which the host waits."""
    likely = logits.softmax(-1)
    return (likely / torch.empty_like(likely).exponential_()).argmax(-1, keepdim=True)


def _warped(logits: torch.Tensor, warpers: Sequence[LogitsProcessor]) -> torch.Tensor:
    """[M] in float32, as the warpers leave them."""
    scores, nothing = logits.float()[None], torch.empty(1, 0, dtype=torch.long)
    for warper in warpers:
        scores = warper(nothing, scores)
    return scores[0]
