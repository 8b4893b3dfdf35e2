"""No key of the user's goes to a server that it is not for, nor to a program that needs none."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from headstart.cli.main import main
from tests.helpers.servers import Stranger, stranger

KEY = "HEADSTART_SERVER_API_KEY"
OPENAI = {
    "OPENAI_API_KEY": "sk-secret-key",
    "OPENAI_ADMIN_KEY": "sk-secret-admin",
    "OPENAI_ORG_ID": "org-secret",
    "OPENAI_PROJECT_ID": "proj-secret",
    "OPENAI_CUSTOM_HEADERS": "X-Gateway-Key: gateway-secret",
}


@pytest.fixture
def server() -> Iterator[Stranger]:
    with stranger() as up:
        yield up


@pytest.fixture(autouse=True)
def keys_of_openai(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)
    for name, value in OPENAI.items():
        monkeypatch.setenv(name, value)


def regenerate(url: str, folder: Path, *more: str) -> int:
    folder.mkdir(exist_ok=True)
    rows = "".join(json.dumps({"prompt": text * 9}) + "\n" for text in "ab")
    (folder / "prompts.jsonl").write_text(rows)
    return main([
        "regenerate", f"server.url={url}", f"output_dir={folder / 'out'}", *more,
        "target.name=tiny-gemma4", f"data.prompts=[{folder / 'prompts.jsonl'}]",
        "data.max_new_tokens=4", "data.num_conversations=2", "data.validation_conversations=1",
    ])  # fmt: skip


def test_a_server_gets_none_of_the_users_keys_for_openai(server: Stranger, tmp_path: Path) -> None:
    assert regenerate(server.url, tmp_path) == 0
    assert len(server.headers) > 2
    heard = {value for headers in server.headers for value in headers.values()}
    assert [value for value in heard if "secret" in value] == []


def test_a_server_gets_the_key_that_is_meant_for_it(
    server: Stranger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "its-own")
    assert regenerate(server.url, tmp_path / "a") == 0
    assert {h["authorization"] for h in server.headers} == {"Bearer its-own"}
    monkeypatch.setenv("MINE", "another")
    server.headers.clear()
    assert regenerate(server.url, tmp_path / "b", "server.api_key_env=MINE") == 0
    assert {h["authorization"] for h in server.headers} == {"Bearer another"}


def test_a_key_that_is_named_and_not_there_is_said_before_anything_is_sent(
    server: Stranger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert regenerate(server.url, tmp_path, "server.api_key_env=NOWHERE") == 1
    assert "NOWHERE" in capsys.readouterr().err
    assert server.headers == []


def test_a_redirect_to_another_host_is_not_followed(
    server: Stranger,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It would carry the prompts there too."""
    monkeypatch.setenv(KEY, "its-own")
    with stranger() as elsewhere:
        server.redirect = elsewhere.url
        assert regenerate(server.url, tmp_path) == 1
        assert elsewhere.headers == []
        said = capsys.readouterr().err
        assert elsewhere.url in said
        assert "server.url" in said


def test_a_password_in_the_address_of_a_server_is_sent_and_not_shown(
    server: Stranger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.status = 422
    url = server.url.replace("://", "://me:pass-secret@")
    assert regenerate(url, tmp_path) == 1
    assert server.headers[0]["authorization"].startswith("Basic ")
    said = capsys.readouterr()
    assert "secret" not in said.out + said.err
    assert server.url.removeprefix("http://") in said.err


def test_a_server_that_wants_a_key_is_told_by_which_variable_it_gets_one(
    server: Stranger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.status = 401
    assert regenerate(server.url, tmp_path) == 1
    said = capsys.readouterr().err
    assert KEY in said
    assert "server.api_key_env=OPENAI_API_KEY" in said


@pytest.mark.parametrize("how", ["message", "redirect"])
def test_a_key_that_a_server_quotes_is_not_printed(
    how: str,
    server: Stranger,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With another status than 401 and 403."""
    monkeypatch.setenv(KEY, "its-own-key")
    if how == "redirect":
        server.redirect = "http://127.0.0.1:9/login?key=its-own-key&next="
    else:
        server.status, server.quotes = 400, True
    assert regenerate(server.url, tmp_path) == 1
    said = capsys.readouterr()
    assert "127.0.0.1" in said.err
    assert "its-own-key" not in said.out + said.err
