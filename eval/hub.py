"""What is asked of the Hub: a model's licence, and to take a folder in one commit, or none and a
line that says what to do."""

from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from headstart.heads.progress import say

LICENCE = ("license", "license_name", "license_link")  # fields of a card
SECONDS = 10.0  # that the Hub may take to tell a licence


def declared_licence(name: str, revision: str | None) -> dict[str, str] | str:
    """What a model's card says of its licence, as fields of a card; a text: why none is known."""
    try:
        card = HfApi().model_info(name, revision=revision, timeout=SECONDS).card_data
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled) as error:
        return f"the Hub does not tell the licence of {name} ({_short(error)})"
    except Exception as error:
        if not _is_of_the_network(error):
            raise
        return f"the Hub could not be asked for the licence of {name} ({_short(error)})"
    said = card.to_dict() if card is not None else {}
    if not said.get("license"):
        return f"the card of {name} names no licence"
    return {key: said[key] for key in LICENCE if said.get(key)}


def _short(error: Exception) -> str:
    if isinstance(error, HfHubHTTPError):
        return f"HTTP {error.response.status_code}"
    return type(error).__name__


def _is_of_the_network(error: BaseException) -> bool:
    # huggingface_hub 1 speaks through httpx, 2 through httpx2.
    return type(error).__module__.startswith(("httpx", "httpcore"))


def upload(folder: Path, repo_id: str, private: bool, branch: str | None, create_pr: bool) -> str:
    """Upload a folder in one commit; returns where it is. Large files that an earlier try has
    brought there are not sent again.

    Args:
        folder: all of it.
        repo_id: ORG/NAME, created where it is not there.
        private: whether none but its owners are to see it.
        branch: created where it is not there; None: main.
        create_pr: as a pull request.

    Raises:
        ValueError: the repository is there, and can be seen by all where it was to be private.
        RuntimeError: the Hub refuses or cannot be reached; the message says what to do.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    api = HfApi(library_name="headstart")
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        # One that is there keeps its visibility, whatever was asked for.
        if private and not api.repo_info(repo_id).private:
            raise ValueError(f"{repo_id} is there, and public: --public publishes where all see it")
        if branch is not None:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        # Not `upload_folder`, which makes several commits where hf_xet is installed.
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(str(path.relative_to(folder)), path) for path in files],
            commit_message="Publish a draft head",
            revision=branch,
            create_pr=create_pr,
        )
    except Exception as error:
        if (why := _why(error, repo_id)) is None:
            raise
        raise RuntimeError(why) from error
    say(f"Published: {commit.pr_url or commit.commit_url}")
    return str(commit.pr_url or commit.commit_url)


def _why(error: Exception, repo_id: str) -> str | None:
    """What to do after an upload failed; None: it did not fail for the Hub or the way there."""
    for cause in _causes(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set: unset it to publish"
        if isinstance(cause, LocalTokenNotFoundError):
            return "the Hub wants a token: run `hf auth login`, or set HF_TOKEN"
        if isinstance(cause, HfHubHTTPError):
            return _refusal(cause, repo_id)
    *_, innermost = _causes(error)
    # hf_xet makes a RuntimeError of everything that happens to large files.
    cut = isinstance(innermost, ConnectionError | TimeoutError | RuntimeError)
    if not (cut or _is_of_the_network(innermost)):
        return None
    return (
        f"the connection to the Hub was cut ({type(innermost).__name__}): run the same command "
        "again, large files that arrived are not sent again"
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and what it came from."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def _refusal(error: HfHubHTTPError, repo_id: str) -> str:
    status = error.response.status_code
    said = f"; the Hub says: {error.server_message}" if error.server_message else ""
    if status == 401 or isinstance(error, RepositoryNotFoundError):
        return (
            f"the Hub does not know you, or {repo_id} is not yours to see (401): run `hf auth "
            f"login` with a token that may write{said}"
        )
    match status:
        case 403:
            return (
                f"your token may not write to {repo_id} (403): make one that may, or ask its "
                f"owner{said}"
            )
        case 409 | 412:
            return (
                f"somebody else changed {repo_id} at the same time ({status}): run the command "
                f"again{said}"
            )
        case _ if status >= 500:
            return f"the Hub fails at the moment ({status}): run the command again later{said}"
    return f"the Hub refused {repo_id} ({status}){said}"
