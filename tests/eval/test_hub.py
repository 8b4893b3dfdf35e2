"""Uploads to a stand-in of the Hub: whole or not at all, and what to do where one fails."""

import time
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest

from tests.helpers.hub import TOKEN, Fault, Hub, Repository
from tests.helpers.runs import REPO, publish


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Fault("POST", "/repos/create", 401), "hf auth login"),
        (Fault("POST", "/repos/create", 403), "may not write"),
        (Fault("POST", "/repos/create", "cut"), "again"),
        (Fault("POST", "/preupload/", 403), "may not write"),
        (Fault("POST", "/info/lfs/", 403), "may not write"),
        (Fault("PUT", "/lfs/", 403), "may not write"),
        (Fault("PUT", "/lfs/", 500), "later"),
        (Fault("PUT", "/lfs/", "cut"), "run the same command again"),
        (Fault("POST", "/commit/", 401), "hf auth login"),
        (Fault("POST", "/commit/", 403), "may not write"),
        (Fault("POST", "/commit/", 409), "same time"),
        (Fault("POST", "/commit/", 412), "same time"),
        (Fault("POST", "/commit/", 500), "later"),
    ],
    ids=lambda value: f"{value.path}{value.what}" if isinstance(value, Fault) else "",
)  # fmt: skip
def test_refusals_say_what_to_do_and_never_the_token(
    finished_run: Path,
    hub: Hub,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
    says: str,
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the Hub library's own tries
    hub.faults.append(replace(fault, times=100))
    assert publish(finished_run, "--debug") == 1
    out, err = capsys.readouterr()
    assert says in err
    assert TOKEN not in out + err
    if fault.what != "cut":
        assert "as asked for" in err, "what the Hub itself said"
    assert not any(repository.files("main") for repository in hub.repositories.values())


def test_an_upload_that_was_cut_goes_on_without_sending_large_files_again(
    finished_run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults.append(Fault("POST", "/commit/", "cut", times=100))
    assert publish(finished_run) == 1
    assert "again" in capsys.readouterr().err
    assert hub.repositories[REPO].files("main") == {}
    sent = [request for request in hub.requests if request.startswith("PUT")]
    assert len(sent) == 1
    hub.faults.clear()
    assert publish(finished_run) == 0
    assert [request for request in hub.requests if request.startswith("PUT")] == sent
    weights = (finished_run / "head" / "model.safetensors").read_bytes()
    assert hub.repositories[REPO].files("main")["model.safetensors"] == weights


def test_a_private_head_never_lands_in_a_repository_that_all_see(
    finished_run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories[REPO] = Repository("public")
    assert publish(finished_run) == 1
    assert "publish.private=false" in capsys.readouterr().err
    assert hub.repositories[REPO].files("main") == {}
    assert publish(finished_run, "publish.private=false") == 0
    assert hub.repositories[REPO].files("main")


def test_without_the_hub_it_is_said_what_keeps_it_away(
    finished_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert publish(finished_run) == 1
    assert "unset it to publish" in capsys.readouterr().err


def test_branches_and_pull_requests(finished_run: Path, hub: Hub) -> None:
    assert publish(finished_run, "publish.branch=v2") == 0
    assert publish(finished_run, "publish.create_pr=true") == 0
    repository = hub.repositories[REPO]
    assert repository.files("main") == {}
    assert set(repository.files("v2")) == set(repository.files("refs/pr/1"))
