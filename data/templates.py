"""Token ids of prompts and conversations for a target, and which of them it wrote."""

from transformers import PreTrainedTokenizerBase

from headstart.data.prompts import Prompt


def encode_prompt(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None
) -> list[int]:
    """Token ids of a prompt, ready for the target to continue.

    The chat template is used where the tokenizer has one and the prompt is not raw; otherwise
    the plain text. Longer prompts keep the first token (<bos>) and their last ones.
    """
    if tokenizer.chat_template and not prompt.raw:
        ids = tokenizer.apply_chat_template(
            prompt.messages, add_generation_prompt=True, return_dict=True
        )["input_ids"]
    else:
        ids = tokenizer(prompt.text)["input_ids"]
    if max_tokens is not None and len(ids) > max_tokens:
        ids = [ids[0], *ids[len(ids) - max_tokens + 1 :]]
    return list(ids)
