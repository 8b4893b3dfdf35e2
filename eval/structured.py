"""Whether texts are of the JSON schemas that they were held to, by the library jsonschema."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from headstart.data.prompts import Prompt
from headstart.eval.measurements import Text
from headstart.heads.structured import StructuredOutput
from headstart.heads.target import Target

SHOWN = 5  # invalid texts that a result names


def structured_output(target: Target, prompts: Sequence[Prompt]) -> StructuredOutput | None:
    """What holds the texts of prompts to their JSON schemas; None: they have none.

    Raises:
        ModuleNotFoundError: the extra `structured` is not installed.
        ValueError: a schema cannot be held to; its prompt is named.
    """
    asked = [prompt for prompt in prompts if prompt.json_schema is not None]
    if not asked:
        return None
    structured = StructuredOutput(target)
    for prompt in asked:
        assert prompt.json_schema is not None
        try:
            structured.processor(prompt.json_schema, 0)
            fault("", prompt.json_schema)
        except ValueError as error:
            raise ValueError(f"the prompt {prompt.id} cannot be used: {error}") from error
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


def validity(
    target: Target, texts: Sequence[Text], schemas: Mapping[str, dict[str, Any]]
) -> dict[str, Any] | None:
    """Of the texts with a schema, by the ids of their prompts: how many there are, how many ended
    before the limit, how many of those are valid, and some that are not. None: there are none."""
    held = [text for text in texts if text.id in schemas]
    ended = [text for text in held if text.assisted.tokens[-1] in target.eos_ids]
    invalid = []
    for text in ended:
        written = target.tokenizer.decode(text.assisted.tokens[:-1])
        if why := fault(written, schemas[text.id]):
            invalid.append({"id": text.id, "turn": text.turn, "seed": text.seed, "why": why})
    counts = {"texts": len(held), "ended": len(ended), "valid": len(ended) - len(invalid)}
    return counts | {"invalid": invalid[:SHOWN]} if held else None
