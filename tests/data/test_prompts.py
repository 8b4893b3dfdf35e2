import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.configs.schema import SourceConfig
from headstart.data.prompts import Prompt, deal, limit_evenly, load_prompts
from headstart.data.templates import encode_prompt, shortened
from headstart.heads.loading import byte_tokenizer

PROMPTS = Path(__file__).resolve().parents[2] / "data" / "prompts"
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def load(tmp_path: Path, *rows: Any, max_bad_rows: float = 0.0, **settings: Any) -> list[Prompt]:
    path = write(tmp_path / "prompts.jsonl", list(rows))
    return load_prompts(SourceConfig(path=str(path), **settings), max_bad_rows)


def prompts(*ids: str) -> list[Prompt]:
    return [Prompt(i, "c", i, [user(i)], False) for i in ids]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [user("a"), assistant("b")]}, [user("a"), assistant("b")]),
        (
            {"messages": [{"role": "developer", "content": "s"}, user("a")], "prompt": "other"},
            [{"role": "system", "content": "s"}, user("a")],
        ),
        (
            {"messages": json.dumps([user("a"), {"role": "model", "content": "b"}])},
            [user("a"), assistant("b")],
        ),
        (
            {
                "messages": [
                    user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
                    {"role": "assistant", "content": None, "tool_calls": [CALL]},
                    {"role": "tool", "tool_call_id": "1", "content": ""},
                ]
            },
            [
                user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
                {"role": "assistant", "tool_calls": [CALL]},
                {"role": "tool", "content": "", "tool_call_id": "1"},
            ],
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "a", "weight": None},
                    {"from": "gpt", "value": "b", "weight": 1},
                    {"from": "observation", "value": "c"},
                ]
            },
            [
                {"role": "system", "content": "s"},
                user("a"),
                assistant("b"),
                {"role": "tool", "content": "c"},
            ],
        ),
        ({"prompt": "a"}, [user("a")]),
        ({"prompt": "a", "response": "b", "text": "other"}, [user("a"), assistant("b")]),
        ({"prompt": "a", "response": None, "completion": "b"}, [user("a"), assistant("b")]),
        ({"prompt": "a", "response": ""}, [user("a")]),
        (
            {"prompt": [user("a")], "completion": [assistant("b")]},
            [user("a"), assistant("b")],
        ),
        (
            {"instruction": "a", "input": "b", "output": "c"},
            [user("a\n\nb"), assistant("c")],
        ),
        ({"instruction": "a", "input": "", "output": ""}, [user("a")]),
        ({"instruction": "a", "input": " \n", "response": "c"}, [user("a"), assistant("c")]),
        ({"messages": None, "text": "a"}, [user("a")]),
    ],
)
def test_every_layout_becomes_chat_turns(
    row: dict[str, Any], messages: list[dict[str, Any]], tmp_path: Path
) -> None:
    [prompt] = load(tmp_path, row)
    assert prompt.messages == messages
    assert prompt.raw == ("text" in row and "prompt" not in row)


def test_optional_columns_are_kept_and_defaults_name_the_line(tmp_path: Path) -> None:
    given = {"id": 0, "category": "code", "source": "s", "raw": True, "tools": json.dumps([TOOL])}
    first, second = load(tmp_path, {"prompt": "a", **given}, "", {"prompt": "b", "tools": []})
    assert first == Prompt("0", "code", "s", [user("a")], True, [TOOL])
    name = "prompts-00003"
    assert second == Prompt(name, "uncategorised", name, [user("b")], False)


def test_a_list_of_texts_is_what_the_user_says_in_turn(tmp_path: Path) -> None:
    turns = ["a", "b", "c"]
    for row in ({"turns": turns}, {"prompt": turns}, {"prompt": turns, "response": "d"}):
        [prompt] = load(tmp_path, row)
        assert (prompt.messages, prompt.later_turns) == ([user("a")], ["b", "c"])
        assert (prompt.text, prompt.raw) == ("a", False)
    [prompt] = load(tmp_path, {"prompt": "a", "turns": ["b", "c"]})
    assert (prompt.messages, prompt.later_turns) == ([user("a")], [])


def test_the_id_is_the_first_of_the_columns_that_may_hold_one(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"task_id": 1},
        {"prompt_id": 2, "task_id": 1},
        {"question_id": 0},
        {"id": "x"},
    ]
    kept = load(tmp_path, *({"prompt": "a", "question_id": None} | row for row in rows))
    assert [p.id for p in kept] == [p.source for p in kept] == ["1", "2", "0", "x"]


def test_empty_cells_of_a_csv_are_missing_ones(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,response,id,raw\na,,,\nb,c,x,false\nd,,,True\n")
    assert load_prompts(tmp_path / "a.csv") == [
        Prompt("a-00000", "uncategorised", "a-00000", [user("a")], False),
        Prompt("x", "uncategorised", "x", [user("b"), assistant("c")], False),
        Prompt("a-00002", "uncategorised", "a-00002", [user("d")], True),
    ]


def test_parquet_gives_the_same_prompts_as_jsonl(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [user("a"), {"role": "assistant", "tool_calls": [CALL]}], "tools": None},
        {"messages": [user("a"), assistant("b")], "tools": [TOOL]},
    ]
    rows = [row | {"id": str(number)} for number, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert load_prompts(tmp_path / "a.parquet") == load_prompts(write(tmp_path / "a.jsonl", rows))


def test_the_text_of_a_prompt_is_its_question(tmp_path: Path) -> None:
    turns = [
        user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "c"},
    ]
    plain, chat = load(tmp_path, {"text": "a b", "response": "c"}, {"messages": turns})
    assert plain.text == "a b"
    assert chat.text == "ab\nc"
    [answered] = load(tmp_path, {"messages": [*turns, assistant("d")]})
    assert (answered.text, answered.question) == (chat.text, chat.messages)


def test_mapped_columns_take_the_place_of_those_that_are_recognized(tmp_path: Path) -> None:
    row = {"messages": "?", "question": "a", "answer": "b", "prompt": "other", "uid": 7}
    columns = {"prompt": "question", "response": "answer", "id": "uid", "source": "uid"}
    [prompt] = load(tmp_path, row, columns=columns)
    assert prompt == Prompt("7", "uncategorised", "7", [user("a"), assistant("b")], False)
    [raw] = load(tmp_path, row, columns={"text": "prompt"})
    assert (raw.text, raw.raw) == ("other", True)
    [swapped] = load(tmp_path, {"prompt": "b", "text": "a"}, columns={"text": "prompt"})
    assert swapped.messages == [user("b")]


def test_a_mapping_that_fits_no_row_names_the_columns_there_are(tmp_path: Path) -> None:
    rows = [{"question": "a"}, {"question": "b", "n": 1}]
    with pytest.raises(ValueError, match=r"jsonl:1: no column qestion \(columns: question\)"):
        load(tmp_path, *rows, columns={"prompt": "qestion"})
    for columns in ({"prompt": "qestion"}, {"prompt": "question", "id": "uid"}):
        with pytest.raises(ValueError, match=r"has the column (qestion|uid) .* n, question\)"):
            load(tmp_path, *rows, max_bad_rows=0.5, columns=columns)
    with pytest.raises(ValueError, match=r"columns maps qestion; known: messages, prompt"):
        load(tmp_path, *rows, columns={"qestion": "prompt"})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"prompt": "a"', "not JSON (Expecting"),
        ([1], 'not an object such as {"prompt": ...}'),
        ({"b": 1, "a": 2}, "no recognized column (columns: a, b)"),
        ({"prompt": None}, "empty prompt"),
        ({"prompt": " \n"}, "empty prompt"),
        ({"messages": [user("a"), assistant("b"), user("")]}, "empty prompt"),
        ({"prompt": 7}, "`prompt` is not text"),
        ({"prompt": "a", "response": {"b": 1}}, "`response` is not text"),
        ({"messages": "hello"}, "`messages` is not JSON"),
        ({"messages": ["hello"]}, "`messages` is not a list of objects"),
        ({"messages": [{"content": "a"}]}, "turn without a role"),
        ({"messages": [{"role": "chorus", "content": "a"}]}, "unknown role 'chorus'"),
        ({"messages": [{"role": "user"}]}, "turn without content"),
        ({"messages": [user("a"), {"role": "assistant", "tool_calls": []}]}, "turn without cont"),
        ({"messages": [user("a"), {"role": "assistant", "tool_calls": 1}]}, "`tool_calls` is not"),
        ({"messages": [user([{"type": "image", "url": "x"}])]}, "content that is not text (a par"),
        ({"messages": [assistant("a")]}, "no user turn"),
        ({"messages": []}, "no user turn"),
        ({"turns": []}, "no user turn"),
        ({"turns": ["a", 7]}, "`turns` is not a list of texts"),
        ({"turns": "a"}, "`turns` is not a list of texts"),
        ({"turns": ["a", " "]}, "empty prompt"),
        ({"prompt": ["a", 7]}, "`prompt` is not a list of objects"),
        ({"prompt": ["a", None]}, "`prompt` is not a list of objects"),
        ({"prompt": []}, "no user turn"),
        ({"prompt": "a", "tools": "["}, "`tools` is not JSON"),
        ({"prompt": "a", "tools": ["weather"]}, "`tools` is not a list of objects"),
    ],
)
def test_a_bad_row_is_named_and_its_reason_given(row: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prompts\.jsonl:3: ") as error:
        load(tmp_path, {"prompt": "fine"}, "", row)
    assert str(error.value).split("jsonl:3: ")[1].startswith(reason)


def test_bad_rows_within_the_limit_are_skipped_and_counted_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "a"}, "{", {"prompt": ""}, "[", *[{"prompt": "a"}] * 6]
    assert len(load(tmp_path, *rows, max_bad_rows=0.3)) == 7
    path = tmp_path / "prompts.jsonl"
    captured = capsys.readouterr()
    detail = "(Expecting property name enclosed in double quotes at column 2)"
    assert captured.err == (
        f"{path}: 7 rows, 3 skipped (2 not JSON, first {path}:2 {detail}; "
        f"1 empty prompt, first {path}:3)\n"
    )
    assert captured.out == ""
    with pytest.raises(ValueError, match=r"3 of 10 rows are unusable \(2 not JSON, .*0\.29$") as e:
        load(tmp_path, *rows, max_bad_rows=0.29)
    assert "raise data.max_bad_rows" in str(e.value)
    assert load(tmp_path, {"prompt": "a"}, max_bad_rows=0.3)
    assert capsys.readouterr().err == ""


def test_a_source_without_a_usable_row_is_not_read_to_its_end(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1000 of 1000 rows are unusable"):
        load(tmp_path, *[{"a": 1}] * 1200, max_bad_rows=0.9)


def test_a_limit_stops_before_the_next_row_is_read(tmp_path: Path) -> None:
    rows = ["{", {"prompt": "a"}, {"prompt": "b"}, "{", {"prompt": "c"}]
    kept = load(tmp_path, *rows, limit=2, max_bad_rows=0.34)
    assert [p.text for p in kept] == ["a", "b"]
    with pytest.raises(ValueError, match="1 of 3 rows"):
        load(tmp_path, *rows, limit=2, max_bad_rows=0.3)


def test_ids_that_come_again_become_unique_and_share_their_source(tmp_path: Path) -> None:
    kept = load(tmp_path, *[{"prompt": "a", "id": i} for i in ("x", "x", "x~2", "x", "y")])
    assert [p.id for p in kept] == ["x", "x~3", "x~2", "x~4", "y"]
    assert [p.source for p in kept] == ["x", "x", "x~2", "x", "y"]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.one_of(
            st.fixed_dictionaries({"prompt": st.text()}, optional={"id": st.integers(0, 3)}),
            st.fixed_dictionaries({"messages": st.recursive(
                st.none() | st.text(max_size=3),
                lambda inner: st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["role", "content", "from"]), inner, max_size=3),
                max_leaves=6,
            )}),
        ),
        min_size=1, max_size=12,
    ),
    cuts=st.lists(st.none() | st.integers(1, 20), min_size=12, max_size=12),
)  # fmt: skip
def test_every_row_is_either_usable_or_counted(
    rows: list[dict[str, Any]], cuts: list[int | None], tmp_path_factory: pytest.TempPathFactory
) -> None:
    lines = [json.dumps(row)[:cut] for row, cut in zip(rows, cuts, strict=False)]
    path = write(tmp_path_factory.mktemp("rows") / "prompts.jsonl", [*lines, {"prompt": "a"}])
    skipped = 0
    for line in lines:
        try:
            load_prompts(write(path.with_name("one.jsonl"), [line]))
        except ValueError as error:
            assert "one.jsonl:1: " in str(error)  # noqa: PT017
            skipped += 1
    usable = load_prompts(path, max_bad_rows=0.999)
    assert len(usable) + skipped == len(lines) + 1
    assert len({p.id for p in usable}) == len(usable)


def test_a_missing_or_empty_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no prompt file .*absent\.jsonl"):
        load_prompts(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no prompts"):
        load_prompts(tmp_path / "empty.jsonl")


def test_a_pool_without_weights_is_dealt_in_rounds_that_the_seed_shuffles() -> None:
    one, two = prompts("a", "b"), prompts("c")
    dealt = deal([(one, None), (two, None)], 7, seed=3)
    assert dealt == deal([(one + two, None)], 7, seed=3)
    assert sorted(p.id for p in dealt[:3]) == sorted(p.id for p in dealt[3:6]) == ["a", "b", "c"]
    assert dealt != deal([(one + two, None)], 7, seed=4)
    # The order of seeded runs made before there were mixtures.
    ids = [p.id for p in deal([(prompts(*"abcdef"), None)], 8, seed=0)]
    assert "".join(ids) == "dfabcecd"


@pytest.mark.parametrize(
    ("weights", "counts"),
    [((1, 1, 1), [4, 3, 3]), ((0.5, 0.3, 0.2), [5, 3, 2]), ((98, 1, 1), [10, 0, 0])],
)
def test_a_weighted_mixture_has_exact_shares(weights: list[float], counts: list[int]) -> None:
    sources = [prompts(*(f"{name}{i}" for i in range(3))) for name in "abc"]
    dealt = deal(list(zip(sources, weights, strict=True)), 10, seed=0)
    ids = [p.id for p in dealt]
    assert [sum(i.startswith(name) for i in ids) for name in "abc"] == counts
    for source in sources:  # starts over only when all of it has been dealt
        times = [ids.count(p.id) for p in source]
        assert max(times) - min(times) <= 1
    assert dealt == deal(list(zip(sources, weights, strict=True)), 10, seed=0)
    assert ids != sorted(ids)


@pytest.mark.parametrize("weights", [(None, None), (1.0, 1.0)])
def test_a_source_with_nothing_left_cannot_be_dealt_from(weights: tuple[float | None, ...]) -> None:
    full = prompts("a") if weights[0] else []
    with pytest.raises(ValueError, match="none left"):
        deal([(full, weights[0]), ([], weights[1])], 4, seed=0)


def test_messages_go_through_the_template_and_raw_text_does_not(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[model]{% endif %}"
    )
    rows = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "model", "content": "yes"}]},
        {"prompt": "hi"},
        {"prompt": "hi", "raw": True},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    texts = [
        tokenizer.decode(encode_prompt(p, tokenizer), skip_special_tokens=True)
        for p in load_prompts(tmp_path / "p.jsonl")
    ]
    assert texts == ["[user]hi[model]", "[user]hi[model]", "hi"]


def test_a_long_prompt_keeps_its_beginning_of_sequence_and_its_end(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "abcdefgh"}\n')
    tokenizer = byte_tokenizer()
    ids = shortened(encode_prompt(load_prompts(tmp_path / "p.jsonl")[0], tokenizer), 4)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == "fgh"


def test_a_limit_is_dealt_over_the_categories() -> None:
    chosen = limit_evenly(load_prompts(PROMPTS / "text_eval.jsonl"), 10)
    per_category = [p.category for p in chosen]
    counts = sorted(per_category.count(c) for c in set(per_category))
    assert counts == [2, 2, 3, 3]
