"""The kind `eagle`: the head of EAGLE-3 (arXiv 2503.01840), one decoder layer with keys and values
of its own (heads/causal.py) over states of a low, a middle and the last layer of the target, each
normed and all of them through one projection. Its later drafts read its own last state in place of
that, in training too, which the paper calls training-time test.

It reads more of the target than the last layer: what is stored for it has the outputs of two layers
more, and an engine would have to hand these out. Chains are verified, no trees, and the table is
the target's, not one of fewer tokens.

Letters: D target width, F states that are read of a row.
"""

from dataclasses import field
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedModel

from headstart.configs.schema import HeadConfig
from headstart.heads.causal import CausalConfig, CausalHead, CausalKind
from headstart.heads.draft_model import make_known
from headstart.heads.kinds import Texts, Verified
from headstart.heads.target import Inputs, Target

LOW = 2
"""Number of the low layer, as EAGLE-3 chooses it; that of the middle one is half their number."""


@strict
class EagleConfig(CausalConfig):
    model_type = "headstart_eagle"
    target_layers: list[int] = field(default_factory=list)
    """Decoder layers of the target whose outputs it reads, ascending, beside the last hidden
    state."""
    target_num_hidden_layers: int = 0


class EagleHead(CausalHead):
    def __init__(self, config: EagleConfig):
        states = len(config.target_layers) + 1
        super().__init__(config, states * config.backbone_hidden_size)
        self.post_init()


class EagleKind(CausalKind):
    name = "eagle"
    model_types = ("headstart_eagle",)
    reads = (
        "hidden states of the whole text, of the last layer and of two more (a low and a middle "
        "one), and its tokens"
    )
    costs = "its one layer a draft, and once for each new token of the text"
    config_class = EagleConfig

    def configure(self, source: Any, head: HeadConfig, drafts: int) -> EagleConfig:
        config = super().configure(source, head, drafts)
        assert isinstance(config, EagleConfig), "of the class said above"
        # Of the last layer it is the hidden state after the final norm, which all kinds get.
        count, last = source.num_hidden_layers, source.num_hidden_layers - 1
        chosen = {min(LOW, last - 1), min(count // 2, last - 1)} - {-1}
        config.target_layers, config.target_num_hidden_layers = sorted(chosen), count
        return config

    def model_class(self, config: Any) -> type[PreTrainedModel]:
        return EagleHead

    def init_weights(self, model: Any, target: Target, from_target: bool) -> None:
        super().init_weights(model, target, from_target)
        width = target.config.hidden_size
        if from_target and model.config.hidden_size == width:
            self.init_narrow(model, torch.eye(width, device=target.device))

    def init_narrow(self, model: Any, down: torch.Tensor) -> None:
        # It begins as a head that reads the last hidden state, nearly.
        model.entry.weight[:, -down.shape[1] :].copy_(down)

    def inputs(self, config: Any) -> Inputs:
        return Inputs(kv=False, layers=tuple(config.target_layers), whole_texts=True)

    def read_of(self, config: Any, seen: Texts | Verified) -> torch.Tensor:
        states = [*(seen.layers[i] for i in config.target_layers), seen.hidden]
        width, eps = config.backbone_hidden_size, config.rms_norm_eps
        # Layers differ in size by orders of magnitude.
        normed = [torch.nn.functional.rms_norm(one, (width,), eps=eps) for one in states]
        return torch.cat(normed, dim=-1)

    def mismatches(self, source: Any, config: Any) -> list[tuple[str, Any, Any]]:
        layers = ("number of layers", config.target_num_hidden_layers, source.num_hidden_layers)
        return [*super().mismatches(source, config), layers]

    def describe(self, config: Any) -> str:
        layers = ", ".join(map(str, config.target_layers))
        return f"{super().describe(config)}, reads layers {layers} and the last"


make_known(EagleConfig, EagleHead)
KIND = EagleKind()
