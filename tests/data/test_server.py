"""The client of answer servers, against a fake of each dialect and against llama.cpp's real server.

The fake's bodies follow what vLLM's, SGLang's and llama.cpp's sources build, or what llama.cpp's
server was seen to send; that it is so, only the tests marked `real` show, for llama.cpp alone.
"""

import asyncio
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.configs.settings import ServerConfig
from headstart.data import server
from headstart.data.prompts import load_prompts
from headstart.data.server import AnswerServer, read_answer, server_ids
from headstart.data.templates import encode_prompt, shortened
from headstart.heads.loading import byte_tokenizer, load_target
from headstart.heads.tokens import Sampling
from tests.helpers.servers import JsonHandler, LlamaServer, real_gguf, serving

Answer = tuple[list[int], bool]
GREEDY, WARM = Sampling(0.0), Sampling(0.7)
TOKENIZER = byte_tokenizer()
EOS = [1, 3]
TEXT = "naïve"
IDS: list[int] = TOKENIZER(TEXT, add_special_tokens=False)["input_ids"]
PROMPT = [2, 40, 41]
Reply = tuple[int, dict[str, Any]]


def body(choice: dict[str, Any], written: int | None = None, **more: Any) -> dict[str, Any]:
    """A response of `/v1/completions`."""
    usage = {} if written is None else {"usage": {"completion_tokens": written}}
    return {"choices": [{"text": TEXT, "finish_reason": "length"} | choice]} | usage | more


def refuse(status: int, message: str) -> Reply:
    return status, {"error": {"message": message, "code": status}}


def cut(answer: Any, limit: int) -> Any:
    """A response with no more than `limit` tokens in any of its lists."""
    if isinstance(answer, list):
        return [cut(item, limit) for item in answer[:limit]]
    if not isinstance(answer, dict):
        return answer
    counted = {"completion_tokens": min(limit, answer.get("completion_tokens", 0))}
    whole = {key: cut(value, limit) for key, value in answer.items()}
    return whole | (counted if "completion_tokens" in answer else {})


@dataclass
class Fake:
    """A server in a thread: `reply` to completions, `models` and `tokens` to the other paths."""

    reply: Callable[[dict[str, Any]], Reply] = lambda _: (200, body({}))
    models: list[str] = field(default_factory=lambda: ["gemma"])
    tokens: list[int] | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    url: str = ""

    def completion(self, request: dict[str, Any]) -> Reply:
        self.asked.append(request)
        status, answer = self.reply(request)
        if status == 200:
            answer = cut(answer, request["max_tokens"])
            usage = {"prompt_tokens": len(request["prompt"])} | answer.get("usage", {})
            answer = answer | {"usage": usage}
        return status, answer


@pytest.fixture
def fake() -> Iterator[Fake]:
    state = Fake()

    class Handler(JsonHandler):
        def do_GET(self) -> None:
            self.send(200, {"object": "list", "data": [{"id": name} for name in state.models]})

        def do_POST(self) -> None:
            request = self.asked()
            if self.path == "/tokenize":
                offered = state.tokens is not None
                self.send(200 if offered else 404, {"tokens": state.tokens})
            else:
                state.keys.append(self.headers["authorization"])
                self.send(*state.completion(request), {"retry-after-ms": "1"})

    with serving(Handler) as state.url:
        yield state


def answers(
    url: str, count: int = 1, model: str | None = None, sampling: Sampling = WARM
) -> tuple[list[list[int]], int]:
    """`count` answers at once, and how many of them came as text alone."""

    async def run() -> tuple[list[list[int]], int]:
        async with AnswerServer(
            ServerConfig(url=url, model=model, concurrency=2), TOKENIZER, EOS
        ) as client:
            await client.check()
            jobs = [client.answer(PROMPT, sampling, seed, len(IDS)) for seed in range(count)]
            return await asyncio.gather(*jobs), client.retokenized

    return asyncio.run(run())


VLLM = body({"token_ids": IDS, "stop_reason": None}, len(IDS))
LLAMA_CPP = body({"logprobs": None}, len(IDS), __verbose={"tokens": IDS, "stop_type": "limit"})
OLD_LLAMA_CPP = body(
    {"logprobs": {"content": [{"id": i, "token": "x", "logprob": -1.0} for i in IDS]}}, len(IDS)
)
OLD_VLLM = body({"logprobs": {"tokens": [f"token_id:{i}" for i in IDS]}}, len(IDS))


@pytest.mark.parametrize("response", [VLLM, LLAMA_CPP, OLD_LLAMA_CPP, OLD_VLLM])
def test_ids_are_taken_as_each_server_gives_them(response: dict[str, Any]) -> None:
    assert read_answer(response, TOKENIZER, EOS, 64) == (IDS, False)


@pytest.mark.parametrize(
    ("choice", "written", "expected"),
    [
        # The end token is there.
        ({"token_ids": [40, 1]}, 2, ([40, 1], False)),
        ({"token_ids": [40, 3], "stop_reason": 3}, 2, ([40, 3], False)),
        # Counted, but left out.
        ({"token_ids": [40]}, 2, ([40, 1], False)),
        ({"token_ids": [40], "matched_stop": 3}, 2, ([40, 3], False)),
        ({"token_ids": [40], "stop_reason": None}, None, ([40, 1], False)),
        # Text alone never has it.
        ({"text": "é"}, None, ([131, 106, 1], True)),
        ({"text": "", "matched_stop": 3}, 1, ([3], True)),
        # Stopped, but not by an end token of the target's.
        ({"token_ids": [40, 50], "stop_reason": 50}, 2, ([40, 50], False)),
        ({"text": "A", "stop_reason": "word"}, 2, ([36], True)),
    ],
)
def test_ids_end_with_an_end_token_exactly_when_the_answer_stopped(
    choice: dict[str, Any], written: int | None, expected: Answer
) -> None:
    response = body({"finish_reason": "stop"} | choice, written)
    assert read_answer(response, TOKENIZER, EOS, 64) == expected


def test_nothing_follows_an_end_token_that_the_server_does_not_know() -> None:
    response = body({"token_ids": [40, 3, 41]}, 3)
    assert read_answer(response, TOKENIZER, EOS, 64) == ([40, 3], False)


def test_ids_that_are_not_all_there_are_not_used() -> None:
    """As llama.cpp's log-probabilities of a text that ends inside a character."""
    assert server_ids(body({"token_ids": IDS[:-1]}, len(IDS))) is None
    assert read_answer(body({"token_ids": IDS[:-1]}, len(IDS)), TOKENIZER, EOS, 64)[1]


def test_ids_outside_the_vocabulary_are_another_models() -> None:
    with pytest.raises(ValueError, match="another model: its token 9999 is outside"):
        read_answer(body({"token_ids": [5, 9999]}, 2), TOKENIZER, EOS, 64)


def test_an_answer_broken_off_is_no_answer() -> None:
    with pytest.raises(RuntimeError, match=r"broke an answer off \(abort\)"):
        read_answer(body({"finish_reason": "abort"}), TOKENIZER, EOS, 64)


def test_prompts_go_out_as_ids_and_sampling_is_plain(fake: Fake) -> None:
    fake.reply = lambda _: (200, VLLM)
    fake.tokens = TOKENIZER(server.PROBE, add_special_tokens=False)["input_ids"]
    assert answers(fake.url) == ([IDS], 0)
    request = fake.asked[-1]
    assert request["prompt"] == PROMPT
    assert (request["model"], request["temperature"], request["seed"]) == ("gemma", 0.7, 0)
    assert (request["max_tokens"], request["top_p"], request["top_k"]) == (len(IDS), 1.0, -1)
    assert "logprobs" not in request
    assert "stop" not in request
    assert len(fake.asked) == 2  # the probe found ids, so nothing else was tried


def test_the_targets_own_top_k_and_top_p_go_out_with_the_request(fake: Fake) -> None:
    fake.reply = lambda _: (200, VLLM)
    answers(fake.url, sampling=Sampling(1.0, top_k=64, top_p=0.95))
    request = fake.asked[-1]
    assert (request["temperature"], request["top_k"], request["top_p"]) == (1.0, 64, 0.95)


def test_log_probabilities_are_asked_for_only_where_nothing_else_brings_ids(fake: Fake) -> None:
    fake.reply = lambda request: (200, OLD_VLLM if "logprobs" in request else body({}, len(IDS)))
    assert answers(fake.url) == ([IDS], 0)
    assert ["logprobs" in request for request in fake.asked] == [False, True, True]


def test_a_server_that_refuses_the_sampling_of_the_target_is_refused(fake: Fake) -> None:
    fake.reply = lambda _: refuse(422, "extra fields")
    with pytest.raises(ValueError, match="refuses with HTTP 422: extra fields"):
        answers(fake.url)
    assert len(fake.asked) == 1


def test_a_server_that_refuses_log_probabilities_alone_is_asked_without_them(fake: Fake) -> None:
    def reply(request: dict[str, Any]) -> Reply:
        return refuse(400, "no logprobs") if "logprobs" in request else (200, body({}, len(IDS)))

    fake.reply = reply
    assert answers(fake.url) == ([IDS], 1)
    assert ["logprobs" in request for request in fake.asked] == [False, True, False]


def test_text_alone_is_tokenized_again_and_says_so(
    fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answers(fake.url) == ([IDS], 1)
    assert capsys.readouterr().out == "the server gives text alone, which is tokenized again\n"
    assert "top_k" in fake.asked[-1]


def test_a_server_that_is_still_loading_is_waited_for(fake: Fake) -> None:
    def loading(request: dict[str, Any]) -> Reply:
        return (200, VLLM) if len(fake.asked) % 3 == 0 else refuse(503, "Loading model")

    fake.reply = loading
    assert answers(fake.url)[0] == [IDS]
    assert len(fake.asked) == 6


def test_a_server_that_stays_away_is_given_up_with_the_work_kept(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_RETRIES", 1)
    fake.reply = lambda _: (200, VLLM) if len(fake.asked) == 1 else refuse(500, "out\nof memory")
    with pytest.raises(RuntimeError, match=r"2 attempts \(out of memory\)\. What is finished is k"):
        answers(fake.url)
    assert len(fake.asked) == 3


def test_one_request_in_vain_ends_the_wait_of_all_others(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_RETRIES", 1)
    fake.reply = lambda _: (200, VLLM) if len(fake.asked) == 1 else refuse(500, "gone")
    with pytest.raises(RuntimeError, match="gave no answer in 2 attempts"):
        answers(fake.url, count=40)
    assert len(fake.asked) <= 1 + 2 * 2, "two at once, two attempts each"


def test_one_request_in_vain_among_others_leaves_those_alone(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_RETRIES", 1)
    fake.reply = lambda asked: refuse(500, "this one") if asked["seed"] == 7 else (200, VLLM)
    with pytest.raises(RuntimeError, match="this one"):
        answers(fake.url, count=40)
    assert {asked["seed"] for asked in fake.asked[1:]} >= {*range(8)}


@pytest.mark.parametrize("status", [400, 404, 422])
def test_a_wrong_request_is_explained_in_one_line_and_not_repeated(fake: Fake, status: int) -> None:
    fake.reply = lambda _: (200, VLLM) if len(fake.asked) == 1 else refuse(status, "too\nlong")
    with pytest.raises(ValueError, match=f"refuses with HTTP {status}: too long$"):
        answers(fake.url)
    assert len(fake.asked) == 2


@pytest.mark.parametrize("status", [401, 403])
def test_the_key_is_sent_and_never_shown(
    fake: Fake, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(server.SERVER_KEY, "sk-secret")
    fake.reply = lambda _: refuse(status, f"wrong key {fake.keys[-1]}")
    with pytest.raises(ValueError, match=f"refuses the key in {server.SERVER_KEY}$") as error:
        answers(fake.url)
    assert fake.keys == ["Bearer sk-secret"]
    assert "secret" not in "".join(traceback.format_exception(error.value))


def test_without_a_server_the_command_ends_at_once(fake: Fake) -> None:
    nobody = "http://127.0.0.1:9"  # "discard": nobody listens there
    with pytest.raises(
        ValueError, match=f"no OpenAI-compatible server answers at {nobody}: .*start"
    ):
        answers(f"{nobody}/v1/")


def test_the_model_is_the_one_that_is_served(fake: Fake) -> None:
    fake.reply = lambda _: (200, VLLM)
    assert answers(f"{fake.url}/v1", model="gemma")[0] == [IDS]
    with pytest.raises(ValueError, match=r"does not serve 'gamma'; it lists gemma"):
        answers(fake.url, model="gamma")
    fake.models = ["gemma", "lora"]
    with pytest.raises(ValueError, match=r"name the model: .* lists gemma, lora"):
        answers(fake.url)


def test_another_tokenizer_is_another_model(fake: Fake) -> None:
    fake.tokens = [7, 8]
    with pytest.raises(ValueError, match=r"another model: its tokenizer makes \[7, 8\] of"):
        answers(fake.url)


def test_a_server_that_adds_tokens_to_the_prompt_is_refused(fake: Fake) -> None:
    fake.reply = lambda request: (200, VLLM | {"usage": {"prompt_tokens": 99}})
    with pytest.raises(ValueError, match="makes 99 tokens of"):
        answers(fake.url)


# The real server.

PROMPTS = Path(__file__).resolve().parents[2] / "data" / "prompts" / "text_eval.jsonl"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return real_gguf(tmp_path_factory.mktemp("gguf"))


@pytest.mark.real
def test_llama_cpp_answers_as_the_target_does(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = load_target("gemma3-270m", "float32")
    prompts = [
        shortened(encode_prompt(p, target.tokenizer), 256) for p in load_prompts(PROMPTS)[::14][:6]
    ]
    bodies = []

    def spy(response: dict[str, Any], *rest: Any) -> Answer:
        bodies.append(response)
        return read_answer(response, *rest)

    monkeypatch.setattr(server, "read_answer", spy)

    async def run(url: str) -> list[list[list[int]]]:
        async with AnswerServer(
            ServerConfig(url=url, concurrency=3), target.tokenizer, [1]
        ) as client:
            await client.check()
            bodies.clear()
            plain = Sampling(1.0)
            greedy = await asyncio.gather(*(client.answer(x, GREEDY, 0, 16) for x in prompts))
            sampled = [await client.answer(prompts[0], plain, seed, 8) for seed in (5, 5, 6)]
            client._extras = client._extras | {"logit_bias": [[1, 100]]}
            ended = await client.answer(prompts[0], GREEDY, 0, 8)
            assert not client.retokenized
            return [greedy, sampled, [ended]]

    with LlamaServer(gguf, tmp_path / "log") as llama:
        greedy, sampled, ended = asyncio.run(run(llama.url))
    assert ended == [[1]]
    assert sampled[0] == sampled[1] != sampled[2]
    for response in bodies:
        ids = server_ids(response)
        assert ids is not None
        text = target.tokenizer.decode(ids, skip_special_tokens=True)
        assert text == response["choices"][0]["text"]
    agree = total = 0
    for prompt, ids in zip(prompts, greedy, strict=True):
        assert len(ids) == 16 or ids[-1] == 1
        whole = torch.tensor([prompt + ids])
        hidden = target.activations(whole).hidden[0, len(prompt) - 1 : -1]
        agree += int((target.logits(hidden).argmax(-1) == whole[0, len(prompt) :]).sum())
        total += len(ids)
    # Each token, after the server's own text so far. Both run the same weights, llama.cpp with
    # activations rounded to 8 bits.
    assert agree >= 0.9 * total


@pytest.mark.real
def test_answers_survive_a_server_that_is_killed_and_started_again(
    gguf: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    from headstart.heads.gemma3_270m import gemma3_270m_dir

    tokenizer = AutoTokenizer.from_pretrained(gemma3_270m_dir())
    prompts = [tokenizer(p.text)["input_ids"][:64] for p in load_prompts(PROMPTS)[:6]]

    async def run(llama: LlamaServer) -> tuple[list[list[int]], int]:
        async with AnswerServer(
            ServerConfig(url=llama.url, concurrency=6), tokenizer, [1]
        ) as client:
            await client.check()
            jobs = [asyncio.create_task(client.answer(ids, GREEDY, 0, 50)) for ids in prompts]
            # Two slots for six prompts: when one is done, others are under way and waiting.
            await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
            llama.kill()
            await asyncio.sleep(0.5)
            llama.start()  # the client comes back while it loads its weights
            return await asyncio.gather(*jobs), client.retokenized

    with LlamaServer(gguf, tmp_path / "log", slots=2) as llama:
        found, retokenized = asyncio.run(run(llama))
    assert all(len(ids) == 50 or ids[-1] == 1 for ids in found)
    assert not retokenized
