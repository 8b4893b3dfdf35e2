"""Which releases of transformers this code was tested with, and what breaks on the others."""

import transformers
from packaging.version import Version

TESTED = ("5.20", "5.23")  # from, up to but without; pyproject.toml holds the same range


def check_transformers() -> None:
    """Raise early where the assistant classes are known not to work.

    Raises:
        RuntimeError: the installed transformers is outside the tested range; the message says
            what fails there and which command installs a release that works.
    """
    installed = Version(transformers.__version__)
    oldest, newest = map(Version, TESTED)
    if oldest <= installed < newest:
        return
    if installed >= newest:
        reason = (
            "from 5.23.0 on Gemma4AssistantForCausalLM cannot be built (ValueError in "
            "kv_sharing_modes) and targets without KV sharing return no shared_kv_states"
        )
    else:
        reason = "before 5.20 assisted generation refuses Gemma 4 assistants or misaligns them"
    raise RuntimeError(
        f"transformers {installed} is outside the tested range >={oldest},<{newest}: {reason}. "
        f"Run: pip install 'transformers>={oldest},<{newest}'"
    )
