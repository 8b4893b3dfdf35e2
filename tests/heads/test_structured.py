"""Text under a JSON schema: plain decoding's own whoever drafts, and all of it of the schema."""

import json
import random
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList

from headstart.heads.decoder import Constant, CostRule, ExactDecoding, Lookup, exact_decoding
from headstart.heads.ordered import with_clusters
from headstart.heads.structured import StructuredOutput
from headstart.heads.target import Target
from tests.helpers.heads import noisy_head, order_by_target
from tests.helpers.models import make_target

pytestmark = pytest.mark.contract
K = 4
SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "count": {"type": "integer", "minimum": 0, "maximum": 99},
            "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 2},
        },
        "required": ["name", "count", "tags"],
        "additionalProperties": False,
    },
    {"enum": ["yes", "no", "yesterday"]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 5},
    {
        "anyOf": [
            {
                "type": "object",
                "properties": {"call": {"const": name}, "at": {"type": ["integer", "null"]}},
                "required": ["call"],
                "additionalProperties": False,
            }
            for name in ("stop", "start", "stare")
        ]
    },
]


@pytest.fixture(scope="module")
def structured() -> StructuredOutput:
    return StructuredOutput(make_target("gemma3"))


def generate(target: Target, schema: dict[str, Any], seed: int, **kwargs: Any) -> list[int]:
    """New tokens under a schema, after a random prompt."""
    prompt = torch.randint(4, 260, (1, 9), generator=torch.Generator().manual_seed(seed))
    processor = StructuredOutput(target).processor(schema, prompt.shape[1])
    settings = {"max_new_tokens": 120, "pad_token_id": 0, "eos_token_id": target.eos_ids}
    torch.manual_seed(seed)
    output = target.model.generate(
        prompt, attention_mask=torch.ones_like(prompt),
        logits_processor=LogitsProcessorList([processor]),
        **{"do_sample": False} | settings | kwargs,
    )  # fmt: skip
    return output[0, prompt.shape[1] :].tolist()


def is_of(target: Target, schema: dict[str, Any], tokens: list[int]) -> bool:
    """Whether a text that ended is JSON of the schema."""
    from jsonschema import Draft202012Validator

    assert tokens[-1] in target.eos_ids, "it ends before the limit"
    text = target.tokenizer.decode(tokens[:-1])
    return Draft202012Validator(schema).is_valid(json.loads(text))


def test_a_mask_depends_on_the_text_alone(structured: StructuredOutput) -> None:
    """One processor that is asked for texts in any order, of any length, of the schema or not, says
    what a new one does for each."""
    rng = random.Random(0)
    for schema in SCHEMAS:
        used, texts = structured.processor(schema, 2), [[7, 8]]
        for _ in range(60):
            text = rng.choice(texts)
            text = text[: rng.randint(2, len(text))]
            ids, scores = torch.tensor([text]), torch.zeros(1, 320)
            said = used(ids, scores)
            assert not scores.any(), "the caller's logits stay"
            assert torch.equal(said, structured.processor(schema, 2)(ids, scores))
            may = (said[0] == 0).nonzero().flatten().tolist()
            # Of the schema, and now and then not, or no token at all: the table has more rows.
            texts.append([*text, rng.choice(may if rng.random() < 0.8 else range(320))])
            texts.append([*texts[-1], rng.choice(range(320))])


def test_after_a_text_that_ended_and_after_one_of_no_schema_logits_stay(
    structured: StructuredOutput,
) -> None:
    tokenizer = make_target("gemma3").tokenizer
    yes = tokenizer('"yes"', add_special_tokens=False)["input_ids"]
    processor, scores = structured.processor({"enum": ["yes"]}, 1), torch.zeros(1, 320)
    assert (processor(torch.tensor([[9, *yes]]), scores)[0] == 0).nonzero().tolist() == [[1]]
    for text in ([*yes, 1], [*yes, 1, 0, 0], [*yes[:2], 40, 41], [40]):
        assert torch.equal(processor(torch.tensor([[9, *text]]), scores), scores)
    both = processor(torch.tensor([[9, *yes[:2]], [9, *yes[:1], yes[0]]]), torch.zeros(2, 320))
    assert (both[0] == 0).nonzero().tolist() == [[yes[2]]]
    assert not both[1].any()


@pytest.mark.parametrize("clusters", [None, 20], ids=["dense", "clusters"])
@pytest.mark.parametrize("schema", SCHEMAS, ids=["object", "enum", "array", "anyOf"])
def test_greedy_text_with_drafts_is_plain_text_and_of_the_schema(
    tiny: Target, schema: dict[str, Any], clusters: int | None
) -> None:
    """In float32, with the stock decoder, ours, drafts that do not know the schema, and lookups.
    Drafts that know it are accepted more often."""
    head = noisy_head(tiny).assistant
    if clusters:
        head = with_clusters(head, clusters, 1)
        order_by_target(head, tiny, tiny.table)
    head.generation_config = GenerationConfig(num_assistant_tokens=K)
    rule = CostRule(0.1, [1.0, 1.1, 1.2, 1.3])
    ways = {
        "knows": ExactDecoding(Constant(K)),
        "ignores": ExactDecoding(Constant(K), follow_text=False),
        "hybrid": ExactDecoding(rule, Lookup(rule)),
    }
    for seed in range(3):
        plain = generate(tiny, schema, seed)
        assert is_of(tiny, schema, plain)
        assert generate(tiny, schema, seed, assistant_model=head) == plain
        assert generate(tiny, schema, seed, prompt_lookup_num_tokens=3) == plain
        small = make_target("gemma3").model  # as a draft model
        assert generate(tiny, schema, seed, assistant_model=small) == plain
        for way in ways.values():
            with exact_decoding(tiny.model, way):
                assert generate(tiny, schema, seed, assistant_model=head) == plain
    accepted = {name: sum(r.accepted for r in way.rounds) for name, way in ways.items()}
    assert accepted["knows"] > 2 * accepted["ignores"]


def test_sampled_texts_are_of_the_schema(tiny: Target) -> None:
    head = noisy_head(tiny).assistant
    head.generation_config = GenerationConfig(num_assistant_tokens=K)
    sampling = {"do_sample": True, "temperature": 1.5, "top_k": 40, "assistant_model": head}
    accepted = 0
    for seed in range(8):
        way = ExactDecoding()
        schema = SCHEMAS[seed % len(SCHEMAS)]
        with exact_decoding(tiny.model, way):
            assert is_of(tiny, schema, generate(tiny, schema, seed, **sampling))
        accepted += sum(r.accepted for r in way.rounds)
    assert accepted > 8


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nothing"},
        {"$ref": "https://example.org/schema.json"},
        {"type": "string", "pattern": "("},
    ],
    ids=["type", "elsewhere", "pattern"],
)
def test_a_schema_that_cannot_be_held_to_is_refused(
    structured: StructuredOutput, schema: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="cannot be held to"):
        structured.processor(schema, 1)
