"""The K-round unroll: what the decoder will feed the head, for many rows in parallel.

Row t pairs the embedding of token x_{t+1} with the target's hidden state h_t, stands at position
t + 1 (in vLLM at t, which a head can be trained for), sees KV rows j <= t, and predicts what the
target says after x_{<= t+1}. In round k the row reads token x_{t+k} and the head's own hidden state
of round k - 1; position and KV stay.

Mirrors `SinglePositionMultiTokenCandidateGenerator.get_candidates` and
`Gemma4AssistantForCausalLM.create_attention_masks` of transformers 5.20 to 5.24.

Letters: B batch, T positions, R rows of a sequence, S of them in rounds above the first, K rounds,
D target width, H head width.
"""

import torch
from torch import nn

from headstart.common.versions import ALL_ROWS
from headstart.configs.schema import RopePosition
from headstart.heads.ordered import token_clusters
from headstart.heads.saving import Assistant
from headstart.heads.target import SharedKV


def row_masks(
    rows: torch.Tensor, starts: torch.Tensor, kv_len: int, sliding_window: int
) -> dict[str, torch.Tensor]:
    """Which KV rows each training row sees, per layer type.

    The sliding mask of the stock assistant is inclusive (`distance <= sliding_window` from the
    newest row), so it shows one row more than a Gemma decoder layer: `t - window <= j <= t`.

    Args:
        rows: [B, R] index of the KV row of t, the last that is seen.
        starts: [B, R] index of the first KV row of the same text: others may be packed before it.
        kv_len: T, KV rows.
        sliding_window: of the configuration.

    Returns:
        Layer type -> bool [B, 1, R, T], True where visible.
    """
    t = rows[:, None, :, None]
    j = torch.arange(kv_len, device=rows.device)
    full = (j <= t) & (j >= starts[:, None, :, None])
    return {"full_attention": full, "sliding_attention": full & (j >= t - sliding_window)}


def ahead_of(
    position: RopePosition, rows: torch.Tensor, starts: torch.Tensor
) -> torch.Tensor | int:
    """How far behind t drafts stand, of `rows` [B, R] in texts that begin at `starts` [B, R]
    (`DraftHead.forward`). Of both: every second row of a text either way, however texts are dealt
    over batches and processes or packed."""
    match position:
        case "newest":
            return 1
        case "one_earlier":
            return 0
        case "both":
            return (rows - starts) % 2


def walked_at(position: RopePosition) -> int:
    """`ahead` of a decoder that serves a head trained so; of both: transformers'."""
    return 0 if position == "one_earlier" else 1


def select(tensor: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[B, R, ...] at `places` [B, S] -> [B, S, ...]; -1 stands for place 0."""
    index = places.clamp_min(0).view(*places.shape, *[1] * (tensor.ndim - 2))
    return tensor.gather(1, index.expand(*places.shape, *tensor.shape[2:]))


class DraftHead(nn.Module):
    """An assistant in training: the native module, and the projection of a low-rank tie.

    Args:
        assistant: from `build_assistant`, its table frozen.
        projection: [D, H] start of the low-rank tie; None for a head as wide as its target.
    """

    def __init__(self, assistant: Assistant, projection: torch.Tensor | None = None):
        super().__init__()
        self.assistant = assistant
        self.projection = None if projection is None else nn.Parameter(projection.clone())

    def forward(
        self,
        hidden: torch.Tensor,
        token_embeds: torch.Tensor,
        rows: torch.Tensor,
        shared_kv: SharedKV,
        starts: torch.Tensor | None = None,
        later: torch.Tensor | None = None,
        ahead: torch.Tensor | int = 1,
    ) -> list[torch.Tensor]:
        """Run K rounds over the same rows.

        Args:
            hidden: [B, R, D] the target's h_t.
            token_embeds: [B, R, K, D] scaled embeddings of x_{t+1} .. x_{t+K}.
            rows: [B, R] index of the KV row of t.
            shared_kv: layer type -> (keys, values), each [B, kv heads, T, head_dim].
            starts: [B, R] index of the first KV row of the same text; None: 0, nothing is packed.
            later: [B, S] which of the R rows go on beyond the first round; None: all.
            ahead: [B, R] or of all rows: how far behind t the drafts stand (RoPE). 1: at the newest
                token, as in transformers and llama.cpp; 0: one earlier, as in vLLM.

        Returns:
            K of [B, R, D], from the second on [B, S, D], or of width H where a narrow head was
            loaded: their product with `draft_table` is the draft's logits.
        """
        starts = torch.zeros_like(rows) if starts is None else starts
        kv_len = next(iter(shared_kv.values()))[0].shape[2]
        window = self.assistant.config.text_config.sliding_window
        masks = row_masks(rows, starts, kv_len, window)
        positions = rows - starts + ahead
        states: list[torch.Tensor] = []
        for k in range(token_embeds.shape[2]):
            if k == 1 and later is not None:
                hidden, token_embeds = select(hidden, later), select(token_embeds, later)
                rows, starts, positions = (select(one, later) for one in (rows, starts, positions))
                masks = row_masks(rows, starts, kv_len, window)
            inputs = torch.cat([token_embeds[:, :, k], hidden], dim=-1)
            state = self.assistant.model(
                inputs_embeds=self.assistant.pre_projection(inputs),
                attention_mask=masks,
                position_ids=positions,
                shared_kv_states=shared_kv,
                use_cache=False,
                **ALL_ROWS,
            ).last_hidden_state
            hidden = self.assistant.post_projection(state)
            states.append(state if self.projection is None else state @ self.projection.T)
        return states

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
