"""The K-round unroll: what the decoder will feed the head, for many rows in parallel.

Row t pairs the embedding of token x_{t+1} with the target's hidden state h_t, stands at position
t + 1 (in vLLM at t, which a head can be trained for), sees KV rows j <= t, and predicts what the
target says after x_{<= t+1}. In round k the row reads token x_{t+k} and the head's own hidden state
of round k - 1; position and KV stay.

Mirrors `SinglePositionMultiTokenCandidateGenerator.get_candidates` and
`Gemma4AssistantForCausalLM.create_attention_masks` of transformers 5.20 to 5.24.

Letters: B rows of keys and values, each of one text or of several that are packed, T positions, R
rows drafted from in each, S of them in rounds above the first, K rounds, D target width, H head
width.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import nn

from headstart.common.versions import ALL_ROWS
from headstart.configs.schema import DraftPositionOffset
from headstart.heads.kernels import fast_kernels
from headstart.heads.ordered import token_clusters
from headstart.heads.saving import Assistant
from headstart.heads.target import SharedKV

Embed: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""Token ids [...] -> their scaled embeddings [..., D]."""


class Texts(NamedTuple):
    """What the target left behind of the texts in B rows: one text in each, or several, packed."""

    hidden: torch.Tensor
    """[B, T, D] post-norm hidden states, or [B, M, D] those of some positions."""
    kv: SharedKV
    """Layer type -> (keys, values), each [B, kv heads, T, head_dim]."""


class Rows(NamedTuple):
    """The positions of `Texts` that are drafted from, and what each round reads there."""

    at: torch.Tensor
    """[B, R] index of the row of t among keys and values."""
    hidden: torch.Tensor
    """[B, R] index of h_t among the hidden states, of which not all may be there."""
    starts: torch.Tensor
    """[B, R] index of the first row of the same text; t is `at - starts`."""
    tokens: torch.Tensor
    """[B, R, K] x_{t+1} .. x_{t+K}."""
    multi_step: torch.Tensor
    """[B, S] which of the R, by number, go on beyond the first round; -1 fills up."""

    def going_on(self) -> "Rows":
        """Those that go on beyond the first round, S in place of R."""
        at, hidden, starts, tokens = (select(one, self.multi_step) for one in self[:4])
        return Rows(at, hidden, starts, tokens, self.multi_step)


def all_rows(at: torch.Tensor, tokens: torch.Tensor) -> Rows:
    """`Rows` at [B, R] of texts that are not packed and have all their hidden states; all rows read
    the K `tokens` [B, R, K]."""
    places = torch.arange(at.shape[1], device=at.device).expand_as(at)
    return Rows(at, at, torch.zeros_like(at), tokens, places)


def row_masks(rows: Rows, kv_len: int, sliding_window: int) -> dict[str, torch.Tensor]:
    """Which KV rows each training row sees, per layer type.

    The sliding mask of the stock assistant is inclusive (`distance <= sliding_window` from the
    newest row), so it shows one row more than a Gemma decoder layer: `t - window <= j <= t`.

    Args:
        rows: R of each text; others may be packed before it.
        kv_len: T, KV rows.
        sliding_window: of the configuration.

    Returns:
        Layer type -> bool [B, 1, R, T], True where visible.
    """
    t = rows.at[:, None, :, None]
    j = torch.arange(kv_len, device=rows.at.device)
    full = (j <= t) & (j >= rows.starts[:, None, :, None])
    return {"full_attention": full, "sliding_attention": full & (j >= t - sliding_window)}


def positions_of(rows: Rows, position: DraftPositionOffset) -> torch.Tensor:
    """[B, R] RoPE positions of the drafts: of the newest token as in transformers and llama.cpp, or
    one earlier as in vLLM. With "mixed", the rows of a text take turns by whether t is odd, so that
    it does not matter how texts are dealt over batches and processes, or packed."""
    t = rows.at - rows.starts
    match position:
        case 0:
            return t + 1
        case -1:
            return t
        case "mixed":
            return t + t % 2


def served_position(position: DraftPositionOffset) -> DraftPositionOffset:
    """Where a decoder puts the drafts of a head trained so; "mixed": where transformers does."""
    return -1 if position == -1 else 0


def select(tensor: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[B, R, ...] at `places` [B, S] -> [B, S, ...]; -1 stands for place 0."""
    index = places.clamp_min(0).view(*places.shape, *[1] * (tensor.ndim - 2))
    return tensor.gather(1, index.expand(*places.shape, *tensor.shape[2:]))


class DraftHead(nn.Module):
    """An assistant in training: the native module, and the projection of a low-rank tie.

    Args:
        assistant: from `build_assistant`, its table frozen.
        projection: [D, H] start of the low-rank tie; None for a head as wide as its target, or
            with a table of its own.
    """

    def __init__(self, assistant: Assistant, projection: torch.Tensor | None = None):
        super().__init__()
        self.assistant = assistant
        self.projection = None if projection is None else nn.Parameter(projection.clone())

    def forward(
        self, texts: Texts, rows: Rows, embed: Embed, position: DraftPositionOffset
    ) -> list[torch.Tensor]:
        """Run K rounds over the same rows.

        Args:
            texts: with keys and values in the dtype to compute in.
            rows: of these texts.
            embed: `Target.embed`.
            position: where drafts stand.

        Returns:
            K of [B, R, D], from the second on [B, S, D], or of width H where a narrow head was
            loaded: their product with `draft_table` is the draft's logits.
        """
        with fast_kernels(self.assistant, small_batch=False):
            return self._run(texts, rows, embed, position)

    def _run(
        self, texts: Texts, rows: Rows, embed: Embed, position: DraftPositionOffset
    ) -> list[torch.Tensor]:
        window = self.assistant.config.text_config.sliding_window
        length = next(iter(texts.kv.values()))[0].shape[2]
        hidden = select(texts.hidden, rows.hidden).to(self.dtype)
        states: list[torch.Tensor] = []
        for k in range(rows.tokens.shape[2]):
            if k == 1:
                hidden, rows = select(hidden, rows.multi_step), rows.going_on()
            if k < 2:  # the rows are the same from the second round on
                masks, positions = row_masks(rows, length, window), positions_of(rows, position)
            inputs = torch.cat([embed(rows.tokens[:, :, k]).to(self.dtype), hidden], dim=-1)
            state = self.assistant.model(
                inputs_embeds=self.assistant.pre_projection(inputs),
                attention_mask=masks,
                position_ids=positions,
                shared_kv_states=texts.kv,
                use_cache=False,
                **ALL_ROWS,
            ).last_hidden_state
            hidden = self.assistant.post_projection(state)
            states.append(state if self.projection is None else state @ self.projection.T)
        return states

    @property
    def dtype(self) -> torch.dtype:
        """That of its weights."""
        dtype: torch.dtype = self.assistant.pre_projection.weight.dtype
        return dtype

    @torch.no_grad()
    def table(self, target_table: torch.Tensor) -> torch.Tensor:
        """[V, H] the LM head to save: the target's table, its product with the projection, or the
        table of its own that a narrow head was loaded with."""
        if self.projection is None:
            return self.draft_table(target_table)
        return target_table.float() @ self.projection

    def draft_table(self, target_table: torch.Tensor) -> torch.Tensor:
        """[V, width of the states] whose product with the states is the draft's logits: the
        target's table, or the table of its own that a narrow head was loaded with."""
        own = self.assistant.lm_head.weight
        return own if len(own) else target_table

    @property
    def cluster_of(self) -> torch.Tensor | None:
        """[V] the cluster of each token; None without ordered embeddings."""
        if (embedder := self.assistant.masked_embedding) is None:
            return None
        clusters = int(embedder.num_centroids)
        return token_clusters(embedder.token_ordering, clusters)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter that the optimizer updates; the tied table is not among them."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}
