"""The kind `mtp`: the multi-token prediction module of DeepSeek-V3 (arXiv 2412.19437) and
Qwen3-Next, one for every depth as in FastMTP (arXiv 2509.18362): the norms of the token's embedding
and of the target's last hidden state, side by side through a projection, then one decoder layer
with keys and values of its own (heads/causal.py).

transformers' `generate(use_mtp=True)` is for modules within the target's own checkpoint, one for
each draft: no Gemma has some, and one module at every depth it does not run.
"""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedModel

from headstart.heads.causal import CausalConfig, CausalHead, CausalKind
from headstart.heads.draft_model import make_known
from headstart.heads.kinds import Texts, Verified


@strict
class MtpConfig(CausalConfig):
    model_type = "headstart_mtp"


class MtpHead(CausalHead):
    def __init__(self, config: MtpConfig):
        super().__init__(config, config.backbone_hidden_size)
        self.post_init()


class MtpKind(CausalKind):
    name = "mtp"
    model_types = ("headstart_mtp",)
    reads = "the last hidden states of the whole text, and its tokens"
    costs = "its one layer a draft, and once for each new token of the text"
    config_class = MtpConfig

    def model_class(self, config: Any) -> type[PreTrainedModel]:
        return MtpHead

    def read_of(self, config: Any, seen: Texts | Verified) -> torch.Tensor:
        return seen.hidden

    def init_narrow(self, model: Any, down: torch.Tensor) -> None:
        model.entry.weight.copy_(down)


make_known(MtpConfig, MtpHead)
KIND = MtpKind()
