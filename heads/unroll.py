"""A head over many rows in parallel: what the decoder will feed it, K drafts from each row.

Letters: B rows of texts, T positions, R rows drafted from in each, S of them in rounds above the
first, K rounds, D target width, H head width, V vocabulary.
"""

from typing import Any, Literal

import torch
from torch import nn

from headstart.configs.schema import DraftPositionOffset
from headstart.heads.kernels import fast_kernels
from headstart.heads.kinds import Embed, Rows, Texts, check_drafts, inputs_of, kind_of
from headstart.heads.ordered import token_clusters
from headstart.heads.target import Inputs


def served_position(position: DraftPositionOffset) -> Literal[0, -1]:
    """Where a decoder puts the drafts of a head trained so; "mixed": where transformers does."""
    return -1 if position == -1 else 0


class DraftHead(nn.Module):
    """A head in training: its model, of any kind, and the projection of a low-rank tie.

    Args:
        assistant: from `build_assistant`, its table frozen.
        projection: [D, H] start of the low-rank tie; None for a head as wide as its target, or
            with a table of its own.
    """

    def __init__(self, assistant: Any, projection: torch.Tensor | None = None):
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
        kind = kind_of(self.assistant.config)
        check_drafts(self.assistant.config, [rows.tokens.shape[2]], "K")
        with fast_kernels(self.assistant, small_batch=False, packs=False):
            states = kind.unroll(self.assistant, texts, rows, embed, position)
        if self.projection is None:
            return states
        return [state @ self.projection.T for state in states]

    @property
    def inputs(self) -> Inputs:
        """What it reads of the target."""
        return inputs_of(self.assistant.config)

    @property
    def dtype(self) -> torch.dtype:
        """That of its weights."""
        return next(kind_of(self.assistant.config).layers(self.assistant)[0].parameters()).dtype

    @torch.no_grad()
    def table(
        self, target_table: torch.Tensor, projection: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[V, H] the LM head to save: the target's table, its product with the projection, or the
        table of its own that a narrow head was loaded with. `projection`: all of it, in float32,
        where each process holds a part of its own."""
        if self.projection is None:
            return self.draft_table(target_table)
        whole = self.projection if projection is None else projection
        return target_table.float() @ whole

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
