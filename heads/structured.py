"""Structured output: text that is held to a JSON schema, by a logits processor of `generate`, and
whether it is of it.

Which tokens may come next is said by llguidance (extra `structured`), whose matcher goes forward
with the text. `generate` takes texts back: verification asks for the text with each number of the
drafts, of which later ones may be rejected or break the schema, and the exact decoder asks before
it makes each of them. So the processor here is a function of the text that it is given: its
matcher goes back to where that parts from the text before.

Letters: B texts, n tokens of each, V vocabulary.
"""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor

from headstart.heads.tokens import TargetTokens

FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""White space as `json.dumps` writes it: where any may stand, a small model may write it until the
text's limit."""


def check_structured() -> None:
    """Raise `ModuleNotFoundError` where the extra `structured` is not installed."""
    if lacking := [name for name in ("llguidance", "jsonschema") if find_spec(name) is None]:
        raise ModuleNotFoundError(
            f"JSON schemas need {' and '.join(lacking)}: pip install 'headstart[structured]'"
        )


class StructuredOutput:
    """Makes processors that hold a target's texts to JSON schemas. Reading the tokenizer takes
    seconds, once; a schema takes milliseconds.

    Args:
        target: whose tokenizer and end tokens count.

    Raises:
        ModuleNotFoundError: the extra `structured` is not installed.
        ValueError: llguidance cannot read the tokenizer.
    """

    def __init__(self, target: TargetTokens):
        check_structured()
        from llguidance import LLMatcher
        from llguidance.hf import from_tokenizer

        self.matcher_class: Any = LLMatcher
        try:
            self.tokens = from_tokenizer(target.tokenizer, eos_token=target.eos_ids)
        except ValueError as error:
            why = f"{target.name}: llguidance cannot read its tokenizer: {error}"
            raise ValueError(why) from error

    def processor(self, schema: dict[str, Any], prompt_length: int) -> "SchemaProcessor":
        """For one call of `generate`.

        Args:
            schema: a JSON schema that says nothing that llguidance does not know, and refers to
                nothing outside.
            prompt_length: tokens of the prompt, padding included; what follows is held to it.

        Raises:
            ValueError: there is no such schema, or it cannot be held to.
        """
        grammar = self.matcher_class.grammar_from_json_schema(json.dumps(schema), overrides=FORM)
        matcher = self.matcher_class(self.tokens, grammar, log_level=0)
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())
            raise ValueError(f"this JSON schema cannot be held to: {reason[:300]}")
        return SchemaProcessor(matcher, self.tokens.vocab_size, prompt_length)


class SchemaProcessor(LogitsProcessor):
    """Minus infinity for each token after which no text of the schema goes on; an end of the text
    where it is one. Logits after a text that breaks the schema, or has ended, stay as they are: it
    holds drafts that will be rejected, or padding.

    Made by `StructuredOutput.processor`.
    """

    def __init__(self, matcher: Any, vocab_size: int, prompt_length: int):
        self.matcher, self.vocab_size, self.prompt_length = matcher, vocab_size, prompt_length
        self.matched: list[int] = []
        """Tokens that the matcher has gone along."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] after the texts [B, n], their prompts included."""
        # Not in place: callers show the same logits again.
        scores = scores.clone()
        for place, text in enumerate(input_ids[:, self.prompt_length :].tolist()):
            if (allowed := self._allowed(text, scores.shape[1])) is not None:
                scores[place].masked_fill_(~allowed.to(scores.device), -torch.inf)
        return scores

    def _allowed(self, text: list[int], size: int) -> torch.Tensor | None:
        """[V] which tokens may follow; None: any, the text is not of the schema or has ended."""
        pairs = zip(text, self.matched, strict=False)
        shorter = min(len(text), len(self.matched))
        same = next((place for place, (a, b) in enumerate(pairs) if a != b), shorter)
        back = len(self.matched) - same
        if back and not self.matcher.rollback(back):
            raise RuntimeError(f"llguidance did not go back: {self.matcher.get_error()}")
        del self.matched[same:]
        new = text[same:]
        # At a token that the tokenizer lacks a matcher would fail for good.
        known = next((n for n, token in enumerate(new) if token >= self.vocab_size), len(new))
        taken = self.matcher.try_consume_tokens(new[:known])
        self.matched += new[:taken]
        bits = None
        if taken == len(new):
            bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        if self.matcher.is_error():
            raise RuntimeError(f"llguidance cannot go on: {self.matcher.get_error()}")
        if bits is None:
            return None
        # A table may have rows that no token of the tokenizer stands for, and the other way round.
        allowed = torch.zeros(size, dtype=torch.bool)
        said = np.unpackbits(bits, bitorder="little", count=self.vocab_size)[:size]
        allowed[: len(said)] = torch.from_numpy(said).bool()
        return allowed


def structured_output(
    target: TargetTokens, schemas: Mapping[str, dict[str, Any]]
) -> StructuredOutput | None:
    """What holds the texts of prompts to their JSON schemas, by their ids; None: there are none.

    Raises:
        ModuleNotFoundError: the extra `structured` is not installed.
        ValueError: a schema cannot be held to; its prompt is named.
    """
    if not schemas:
        return None
    structured = StructuredOutput(target)
    for name, schema in schemas.items():
        try:
            structured.processor(schema, 0)
            fault("", schema)
        except ValueError as error:
            raise ValueError(f"the prompt {name} cannot be used: {error}") from error
    return structured


def fault(text: str, schema: dict[str, Any]) -> str | None:
    """What keeps a text from being JSON of a schema; None: nothing.

    Raises:
        ValueError: that is no JSON schema.
    """
    import jsonschema
    from referencing import Registry

    judge = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    try:
        judge.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"no JSON schema: {error.message[:300]}") from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"no JSON: {error}"
    # A registry of nothing: a schema of somebody else's has nothing fetched.
    found = next(judge(schema, registry=Registry()).iter_errors(value), None)
    return None if found is None else found.message
