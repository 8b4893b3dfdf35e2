"""The kind `parallel`: one stack of residual blocks for each draft, all of them on the target's
last hidden state alone, as the heads of Medusa (arXiv 2401.10774) and of Gloeckle et al. (arXiv
2404.19737).

No draft reads the tokens before it, so that K drafts cost K small products and no attention; what
it drafts second knows the first draft only as far as the hidden state tells. Chains are verified,
no trees. At step 0 each stack adds nothing: each draft is what the target itself said before.

Letters: B rows of texts, R rows drafted from in each, K drafts, D target width, H head width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedModel

from headstart.configs.schema import DraftPositionOffset, HeadConfig
from headstart.heads.draft_model import DraftConfig, DraftModel, ResidualBlock, make_known, shapes
from headstart.heads.kinds import DraftMemory, Embed, HeadKind, Rows, Texts, Verified, select
from headstart.heads.target import Target


@strict
class ParallelConfig(DraftConfig):
    model_type = "headstart_parallel"


class Draft(nn.Module):
    """What makes draft k of the hidden state, [..., H] -> [..., H]."""

    def __init__(self, config: ParallelConfig):
        super().__init__()
        sizes = (config.hidden_size, config.intermediate_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(ResidualBlock(*sizes) for _ in range(config.num_hidden_layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class ParallelHead(DraftModel):
    def __init__(self, config: ParallelConfig):
        super().__init__(config)
        self.drafts = nn.ModuleList(Draft(config) for _ in range(config.num_drafts))
        self.post_init()


class ParallelState:
    """The target's hidden state at the token before the newest; drafts leave nothing behind but
    their number."""

    def __init__(self, model: ParallelHead):
        self.model = model
        self.hidden, self.state = torch.empty(0), torch.empty(0)
        self.drafted = 0

    def commit(self, seen: Verified) -> None:
        valid = seen.tokens.shape[1]
        self.hidden = seen.hidden[:, valid - 1 : valid]

    def begin(self) -> None:
        table = self.model.lm_head.weight
        self.state = self.model.pre_projection(self.hidden.to(table.device, table.dtype))
        self.drafted = 0

    def step(self, token: torch.Tensor) -> torch.Tensor:
        draft: torch.Tensor = self.model.drafts[self.drafted](self.state)
        self.drafted += 1
        return draft


class ParallelKind(HeadKind):
    name = "parallel"
    model_types = ("headstart_parallel",)
    reads = "the last hidden state"
    costs = "one of its K stacks of residual blocks a draft"

    def configure(self, source: Any, head: HeadConfig, drafts: int) -> ParallelConfig:
        return ParallelConfig(**shapes(source, head, drafts))

    def model_class(self, config: Any) -> type[PreTrainedModel]:
        return ParallelHead

    def init_weights(self, model: Any, target: Target, from_target: bool) -> None:
        for layer in self.layers(model) if from_target else ():
            layer.down_proj.weight.zero_()  # type: ignore[union-attr, operator]

    def init_narrow(self, model: Any, down: torch.Tensor) -> None:
        model.pre_projection.weight.copy_(down)

    def unroll(
        self, model: Any, texts: Texts, rows: Rows, embed: Embed, position: DraftPositionOffset
    ) -> list[torch.Tensor]:
        weight = model.drafts[0].layers[0].up_proj.weight
        first = model.pre_projection(select(texts.hidden, rows.hidden).to(weight.dtype))
        later = select(first, rows.multi_step)
        drafts = model.drafts[: rows.tokens.shape[2]]
        return [draft(later if k else first) for k, draft in enumerate(drafts)]

    def draft_state(self, model: Any, embed: Embed, padding: int, offset: int) -> ParallelState:
        return ParallelState(model)

    def layers(self, model: Any) -> Sequence[nn.Module]:
        return [layer for draft in model.drafts for layer in draft.layers]

    def describe(self, config: Any) -> str:
        return (
            f"{config.num_drafts} drafts of {config.num_hidden_layers} residual blocks, width "
            f"{config.hidden_size}, inner width {config.intermediate_size}"
        )

    def draft_memory(self, config: Any, compute: int) -> DraftMemory:
        # The norm's input and output in float32; what enters the products; the activation.
        each = config.hidden_size * (8 + compute) + 2 * config.intermediate_size * compute
        narrow = config.hidden_size < config.backbone_hidden_size
        beside = config.backbone_hidden_size * compute * narrow + 4 * config.hidden_size
        layers = [each] * int(config.num_hidden_layers)
        return DraftMemory(layers, beside, [0] * len(layers))

    def most_drafts(self, config: Any) -> int:
        return int(config.num_drafts)

    def draft_share(self, config: Any) -> float:
        return 1 / float(config.num_drafts)


make_known(ParallelConfig, ParallelHead)
KIND = ParallelKind()
