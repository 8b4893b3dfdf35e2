"""What a command of many stages has found so far, kept from one start of it to the next."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headstart.heads.files import write_atomically


class Notes:
    """Findings by stage in a JSON file, with the seconds that each stage took.

    Args:
        path: of the file.
        settings: that all of it stands for.

    Raises:
        ValueError: the file is of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        self.found: dict[str, Any] = {"settings": settings, "seconds": {}}
        if path.is_file():
            self.found = json.loads(path.read_text(encoding="utf-8"))
        there = self.found["settings"]
        for key in settings | there:
            if settings.get(key) != there.get(key):
                raise ValueError(
                    f"{path.parent} was begun with {key}={there.get(key)}, now "
                    f"{settings.get(key)}: give it back, or name another folder, --out DIR"
                )

    def once(self, stage: str, work: Callable[[], Any]) -> Any:
        """What `work` returns (it must go into JSON); the first time it is done and noted."""
        if stage not in self.found:
            began = time.monotonic()
            found = work()
            self.found["seconds"][stage] = time.monotonic() - began
            self.found[stage] = found
            write_atomically(self.path, json.dumps(self.found) + "\n")
        return self.found[stage]

    @property
    def seconds(self) -> dict[str, float]:
        """Stage -> how long it took."""
        seconds: dict[str, float] = self.found["seconds"]
        return seconds
