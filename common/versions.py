"""What depends on the release of transformers; nothing else in Headstart asks for it."""

from typing import Any

import transformers
from packaging.specifiers import SpecifierSet
from packaging.version import Version

TESTED = ">=5.20,!=5.23.*,<5.25"  # pyproject.toml holds the same range
INSTALLED = Version(transformers.__version__)

CACHE = "cache" if INSTALLED.release >= (5, 24) else "past_key_values"
"""What forwards, their outputs and hooks, and `generate` call the cache. The later releases take
the earlier name as a keyword, with a warning; hooks and overridden forwards see the new one."""

CUTS_ROWS = INSTALLED.release >= (5, 23)
"""Whether layers that share keys and values run only on the rows whose logits are asked for."""

ALL_ROWS: dict[str, Any] = {"logits_to_keep": None} if CUTS_ROWS else {}
"""Keywords for a head's text model over several rows, which it is not to cut: that fails in a model
without inputs per layer (docs/upstream.md)."""


def skips_prefill(config: Any) -> bool:
    """Whether plain decoding of a target of this text configuration runs on a part of the prompt
    alone in some layers. Decoding with a head, which asks for hidden states, runs on all of it."""
    # Gemma 3 shares no keys and has no such field.
    return CUTS_ROWS and getattr(config, "num_kv_shared_layers", 0) > 0


def check_rows(rows: int, tokens: int) -> None:
    """Raise `RuntimeError` where a target did not run on every token, padding included: what a head
    would be trained on is wrong."""
    if rows != tokens:
        raise RuntimeError(
            f"the target's last hidden states are of {rows} rows where it was given {tokens} "
            f"tokens: transformers {INSTALLED} leaves out rows that a draft head is trained on, so "
            f"nothing is kept. Please report it; another release of 'transformers{TESTED}' may do"
        )


def check_transformers() -> None:
    """Raise `RuntimeError`, with the command that installs another release, where the assistant
    classes are not known to work.

    Before 5.20 assisted generation refuses Gemma 4 assistants or misaligns them. In 5.23 they
    cannot be built (ValueError in kv_sharing_modes), and targets without KV sharing return no
    shared_kv_states.
    """
    if not SpecifierSet(TESTED).contains(INSTALLED, prereleases=True):
        raise RuntimeError(
            f"transformers {INSTALLED} is outside the tested range {TESTED}: draft heads cannot be "
            "built there, or what they are trained on may differ without an error. "
            f"Run: pip install 'transformers{TESTED}'"
        )
