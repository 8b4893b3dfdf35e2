"""A moment of decoding that can be repeated: steps, verifications and drafts from the same context.

Letters: T tokens of context, K draft tokens, D target width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from headstart.heads.drafting import CleanKV, Drafter
from headstart.heads.gemma3 import SharedKV
from headstart.heads.targets import Target
from headstart.heads.versions import CACHE

MAX_DRAFT_TOKENS = 8  # verifications are measured for K = 1 .. 8


@dataclass(frozen=True)
class Moment:
    """A target that has run on `context` tokens, and what a draft after its next step starts from.

    Each step, verification and draft starts from here again; `restore` takes back what a step
    added to the cache.
    """

    target: Target
    ids: torch.Tensor
    """[1, T + K + 1] the context and the tokens after it."""
    context: int
    """T, tokens in the cache."""
    cache: DynamicCache
    hidden: torch.Tensor
    """[1, 1, D] the target's last hidden state of token T."""
    shared_kv: SharedKV
    """Layer type -> (keys, values), each [1, kv heads, rows, head_dim], as the stock decoder hands
    them to the head."""
    kv: CleanKV
    """The same as the exact decoder does."""

    def step(self) -> torch.Tensor:
        """Decode one token plainly, as `generate` does: the next token, [1, 1]."""
        return self._go_on(1).logits.float().argmax(dim=-1)

    def verify(self, num_assistant_tokens: int) -> torch.Tensor:
        """Verify K draft tokens as the stock assisted decoder does: the target's own tokens
        [1, K + 1]. It asks for hidden states and shared KV, and compares in float32."""
        outputs = self._go_on(
            1 + num_assistant_tokens, output_hidden_states=True, return_shared_kv_states=True
        )
        return outputs.logits.float().argmax(dim=-1)

    def draft(self, assistant: PreTrainedModel, num_assistant_tokens: int) -> torch.Tensor:
        """Draft K tokens after token T + 1: [1, K].

        Mirrors the loop of `SinglePositionMultiTokenCandidateGenerator.get_candidates` of
        transformers 5.20 to 5.24.
        """
        embed = self.target.model.get_input_embeddings()
        token, hidden = self.ids[:, self.context + 1 : self.context + 2], self.hidden
        position = torch.tensor([[self.context + 1]], device=self.ids.device)
        mask = torch.ones_like(self.ids[:, : self.context + 2])
        drafts = []
        for _ in range(num_assistant_tokens):
            outputs = assistant(
                inputs_embeds=torch.cat([embed(token), hidden], dim=-1),
                attention_mask=mask,
                position_ids=position,
                shared_kv_states=self.shared_kv,
                use_cache=False,
            )
            token, hidden = outputs.logits.argmax(dim=-1), outputs.last_hidden_state
            drafts.append(token)
        return torch.cat(drafts, dim=1)

    def draft_exact(self, drafter: Drafter, num_assistant_tokens: int) -> list[int]:
        """Draft K tokens after token T + 1 as the exact decoder does."""
        token = self.ids[:, self.context + 1 : self.context + 2]
        drafts = drafter.draft(
            token, self.hidden, self.kv, num_assistant_tokens, frozenset(), goes_on=None
        )
        return drafts.tokens

    def restore(self) -> None:
        """Take the rows after the context out of the cache again."""
        self.cache.crop(self.context - self.cache.get_seq_length())

    def _go_on(self, tokens: int, **kwargs: Any) -> Any:
        return _forward(self.target, self.cache, self.ids[:, : self.context + tokens], **kwargs)


def _forward(target: Target, cache: DynamicCache, ids: torch.Tensor, **kwargs: Any) -> Any:
    """Run the target over the last of `ids` [1, T], those that the cache does not hold yet."""
    return target.model(
        input_ids=ids[:, cache.get_seq_length() :],
        attention_mask=torch.ones_like(ids),
        use_cache=True,
        **{CACHE: cache},
        **kwargs,
    )


@torch.inference_mode()
def prepare(target: Target, context: int) -> Moment:
    """Run the target on a context of `context` tokens.

    The tokens are a seeded random draw of ordinary ids, those of the second and third quarter of
    the vocabulary: special tokens and the places of images stand at its ends. What a step costs
    does not depend on their values, but in a mixture of experts, where chance decides how many of
    them a verification reads.
    """
    vocab_size = target.config.vocab_size
    ids = torch.randint(
        vocab_size // 4,
        3 * vocab_size // 4,
        (1, context + MAX_DRAFT_TOKENS + 1),
        generator=torch.Generator().manual_seed(0),
    ).to(target.device)
    cache = DynamicCache(config=target.config)
    cache.activate_past_recording()  # as the stock assisted decoder does: sliding layers can be cut
    wanted = {"output_hidden_states": True, "return_shared_kv_states": True}
    prefill = _forward(target, cache, ids[:, :context], logits_to_keep=1, **wanted)
    kv = CleanKV(target.config.sliding_window)
    kv.take(prefill.shared_kv_states, context, context)
    cache.crop(0)
    outputs = _forward(target, cache, ids[:, : context + 1], **wanted)
    kv.take(outputs.shared_kv_states, 1, 1)
    shared_kv = dict(outputs.shared_kv_states)
    moment = Moment(target, ids, context, cache, outputs.hidden_states[-1], shared_kv, kv)
    moment.restore()
    return moment


@contextmanager
def dense_lm_head(assistant: PreTrainedModel) -> Iterator[None]:
    """Within, a head with ordered embeddings runs its LM head over the whole vocabulary."""
    ordered = assistant.config.use_ordered_embeddings
    assistant.config.use_ordered_embeddings = False
    try:
        yield
    finally:
        assistant.config.use_ordered_embeddings = ordered
