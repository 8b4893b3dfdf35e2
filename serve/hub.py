"""The Hub: the license that binds a head, public names of what it was made of, the upload."""

import re
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from headstart.common.console import print_once
from headstart.configs.schema import TargetConfig
from headstart.configs.settings import PublishConfig

GEMMA_TERMS = {"license": "gemma", "license_link": "https://ai.google.dev/gemma/terms"}
GOOGLES = "google/gemma-4-"  # begins the names of those that APACHE is of
APACHE = {
    "license": "apache-2.0",
    "license_link": "https://ai.google.dev/gemma/docs/gemma_4_license",
}
LICENSE = ("license", "license_name", "license_link")  # fields of a card
REFUSALS = (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled)
SECONDS = 10.0  # that the Hub may take to tell a license
FIXES = {
    401: "run `hf auth login` with a token that may write there",
    403: "your token may not write there: make one that may, or ask its owner",
    409: "somebody else changed it at the same time: run the command again",
    412: "somebody else changed it at the same time: run the command again",
}
"""What to do where the Hub refuses an upload, by its status."""


def license_of(target_config: Any, served: TargetConfig) -> dict[str, str]:
    """The license of a target's weights, as fields of a model card.

    Gemma 3's terms go with whatever is made from it (https://ai.google.dev/gemma/terms, 3.1). Of a
    Gemma 4 that which its card names; where there is none to be read, that of Google's own
    checkpoints (their cards, and https://ai.google.dev/gemma/docs/gemma_4_license), and of others
    `unknown`, with a line that says why.
    """
    if target_config.model_type.startswith("gemma3"):
        return GEMMA_TERMS
    name, said = served.name, dict[str, Any]()
    why = f"the card of {name} names no license"
    try:
        info = HfApi().model_info(name, revision=served.revision, timeout=SECONDS)
        said = {} if info.card_data is None else info.card_data.to_dict()
    except Exception as error:
        if not (isinstance(error, REFUSALS) or _is_of_the_network(error)):
            raise
        status = f"HTTP {error.response.status_code}" if isinstance(error, HfHubHTTPError) else None
        why = f"the Hub does not tell the license of {name} ({status or type(error).__name__})"
    if said.get("license"):
        return {key: said[key] for key in LICENSE if said.get(key)}
    license = APACHE if name.startswith(GOOGLES) else {"license": "unknown"}
    print_once(
        f"{why}: the head's card says {license['license']}; publish.license=NAME says otherwise"
    )
    return license


def notice(license: dict[str, str], target: str) -> str | None:
    """The file that a license wants beside the weights: the Gemma Terms of Use, 3.1, theirs."""
    if license["license"] != GEMMA_TERMS["license"]:
        return None
    return (
        "Gemma is provided under and subject to the Gemma Terms of Use found at "
        "ai.google.dev/gemma/terms\n\n"
        f"This draft head is a Model Derivative of Gemma: it was distilled from {target}.\n"
    )


REVISION = re.compile(r"\w[\w./-]*")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form ORG/NAME of the Hub, or ORG/NAME@REVISION."""
    repo, at, revision = name.partition("@")
    try:
        validate_repo_id(repo)
    except HFValidationError:
        return False
    return repo.count("/") == 1 and (not at or REVISION.fullmatch(revision) is not None)


def check_hub_id(name: str, what: str, fix: str) -> None:
    """Raise `ValueError`, which says what the name stands for and the fix, unless it can only be
    meant for a repository of the Hub: a folder of this machine may have one of the same form."""
    here = Path(name).exists()
    if here or not is_hub_id(name):
        why = "a path of this machine" if here else "not of the form ORG/NAME"
        raise ValueError(f"{what} {name} is no repository of the Hub ({why}): {fix}")


def _is_of_the_network(error: BaseException) -> bool:
    # huggingface_hub 1 speaks through httpx, 2 through httpx2.
    return type(error).__module__.startswith(("httpx", "httpcore"))


# What readers of heads and of adapters want, and all that is taken of their folders.
HEAD_FILES = re.compile(
    r"config\.json|generation_config\.json|model(-\d+-of-\d+)?\.safetensors|"
    r"model\.safetensors\.index\.json"
)
ADAPTER_FILES = re.compile(r"(adapter|headstart)_config\.json|adapter_model\.safetensors")
SETTINGS, EVALUATION = "training_config.yaml", "evaluation"
TOLD = ("report.*", "adapt.md", "*.png")  # in EVALUATION


def _is_of_a_head(name: str) -> bool:
    """Whether a file of a repository is read as a head, or tells of one."""
    folder, _, file = name.rpartition("/")
    if folder == EVALUATION:
        return any(map(PurePosixPath(file).match, TOLD))
    return bool(HEAD_FILES.fullmatch(name) or ADAPTER_FILES.fullmatch(name))


def upload(folder: Path, repo_id: str, options: PublishConfig) -> str:
    """Upload a folder in one commit, which takes out what an earlier publication left there of the
    head in another form; returns where it is. Large files that an earlier try has brought there are
    not sent again.

    Args:
        folder: all of it.
        repo_id: ORG/NAME, created where it is not there.
        options: whether for its owners alone; the branch, created where it is not there; whether as
            a pull request.

    Raises:
        ValueError: the repository is there, and can be seen by all where it was to be private.
        RuntimeError: the Hub refuses or cannot be reached; the message says what to do.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    api = HfApi(library_name="headstart")
    try:
        api.create_repo(repo_id, private=options.private, exist_ok=True)
        # One that is there keeps its visibility, whatever was asked for.
        if options.private and not api.repo_info(repo_id).private:
            raise ValueError(
                f"{repo_id} is there, and public: publish.private=false publishes where all see it"
            )
        if options.branch is not None:
            api.create_branch(repo_id, branch=options.branch, exist_ok=True)
        there = api.model_info(repo_id, revision=options.branch).siblings or []
        added = {path.relative_to(folder).as_posix(): path for path in files}
        # An adapter beside a whole head, or figures beside those of another, would be read too.
        names = {one.rfilename for one in there}
        ours = {SETTINGS, f"{EVALUATION}/report.json"} <= names
        old = sorted(filter(_is_of_a_head, names)) if ours else []
        # Not `upload_folder`, which makes several commits where hf_xet is installed.
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, path) for name, path in added.items()),
                *(CommitOperationDelete(name) for name in old if name not in added),
            ],
            commit_message="Publish a draft head",
            revision=options.branch,
            create_pr=options.create_pr,
        )
    except Exception as error:
        if (why := _why(error, repo_id)) is None:
            raise
        raise RuntimeError(why) from error
    where = str(commit.pr_url or commit.commit_url)
    print_once(f"Published: {where}")
    return where


def _why(error: BaseException, repo_id: str) -> str | None:
    """What to do after an upload failed; None: it did not fail for the Hub or the way there."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    for cause in causes:
        if isinstance(cause, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set: unset it to publish"
        if isinstance(cause, LocalTokenNotFoundError):
            return "the Hub wants a token: run `hf auth login`, or set HF_TOKEN"
        if isinstance(cause, HfHubHTTPError):
            unknown = isinstance(cause, RepositoryNotFoundError)
            status = 401 if unknown else cause.response.status_code
            fix = FIXES.get(status) if status < 500 else "run the command again later"
            said = f"the Hub says: {cause.server_message}" if cause.server_message else None
            return "; ".join(filter(None, [f"the Hub refused {repo_id} ({status})", fix, said]))
    # hf_xet makes a RuntimeError of everything that happens to large files.
    cut = isinstance(causes[-1], ConnectionError | TimeoutError | RuntimeError)
    if not (cut or _is_of_the_network(causes[-1])):
        return None
    return (
        f"the connection to the Hub was cut ({type(causes[-1]).__name__}): run the same command "
        "again, large files that arrived are not sent again"
    )
