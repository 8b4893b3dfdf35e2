"""The licence that binds a head: that of the target it was distilled from."""

from typing import Any

from headstart.configs.schema import TargetConfig
from headstart.eval.hub import declared_licence
from headstart.heads.progress import say

GEMMA_TERMS = {"license": "gemma", "license_link": "https://ai.google.dev/gemma/terms"}
GOOGLES = "google/gemma-4-"  # begins the names of those that APACHE is of
APACHE = {
    "license": "apache-2.0",
    "license_link": "https://ai.google.dev/gemma/docs/gemma_4_license",
}


def licence_of(target_config: Any, served: TargetConfig) -> dict[str, str]:
    """The licence of a target's weights, as fields of a model card.

    Gemma 3's terms go with whatever is made from it (https://ai.google.dev/gemma/terms, 3.1). Of a
    Gemma 4 that which its card names; where there is none to be read, that of Google's own
    checkpoints (their cards, and https://ai.google.dev/gemma/docs/gemma_4_license), and of others
    `unknown`, with a line that says why.
    """
    if target_config.model_type.startswith("gemma3"):
        return GEMMA_TERMS
    found = declared_licence(served.name, served.revision)
    if isinstance(found, dict):
        return found
    if served.name.startswith(GOOGLES):
        return APACHE
    say(f"{found}: the card says that its licence is unknown; --license NAME says what it is")
    return {"license": "unknown"}


def notice(licence: dict[str, str], target: str) -> str | None:
    """The file that a licence wants beside the weights: the Gemma Terms of Use, 3.1, theirs."""
    if licence["license"] != GEMMA_TERMS["license"]:
        return None
    return (
        "Gemma is provided under and subject to the Gemma Terms of Use found at "
        "ai.google.dev/gemma/terms\n\n"
        f"This draft head is a Model Derivative of Gemma: it was distilled from {target}.\n"
    )
