"""A license that nobody could read is not guessed."""

import pytest

from headstart.configs.schema import TargetConfig
from headstart.heads.loading import load_target_config
from headstart.serve.hub import APACHE, license_of
from tests.helpers.hub import Fault, Hub, Repository

GEMMA4 = load_target_config("tiny-gemma4")


def license(name: str) -> str:
    return license_of(GEMMA4, TargetConfig(name=name))["license"]


@pytest.mark.parametrize("fault", ["cut", 500, 403])
def test_a_hub_that_cannot_be_asked_makes_no_license(
    fault: int | str, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories["org/tiny"] = Repository("public", license="cc-by-nc-4.0")
    assert license("org/tiny") == "cc-by-nc-4.0"
    assert capsys.readouterr().out == ""
    hub.faults.append(Fault("GET", "/api/models/org/tiny", fault, times=100))
    assert license("org/tiny") == "unknown"
    said = capsys.readouterr().out
    assert "the Hub" in said
    assert "publish.license" in said


def test_a_card_that_names_no_license_is_not_apache(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories["org/tiny"] = Repository("public")
    assert license("org/tiny") == "unknown"
    assert "card of org/tiny" in capsys.readouterr().out


def test_a_target_that_is_not_on_the_hub_is_not_apache(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert license("org/gone") == "unknown"
    assert "404" in capsys.readouterr().out


def test_googles_own_checkpoints_have_the_license_of_their_cards(hub: Hub) -> None:
    hub.faults.append(Fault("GET", "/api/models/google", "cut", times=100))
    assert license("google/gemma-4-E2B-it") == APACHE["license"]
    assert license("someone/google/gemma-4-E2B-it") == "unknown"
