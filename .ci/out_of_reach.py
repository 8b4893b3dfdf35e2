"""Imported at the start of a Python process: whatever opens or lists a file of the folder
OUT_OF_REACH then fails, but for what lies within WITHIN_REACH, the dependencies.

It shows that an installed Headstart needs nothing of the checkout that it was built from.
"""

import os
import sys
from typing import Any

FOLDER = os.path.realpath(os.environ["OUT_OF_REACH"])
ALLOWED = os.path.realpath(os.environ["WITHIN_REACH"])


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in ("open", "os.listdir", "os.scandir", "os.chdir"):
        return
    if not isinstance(arguments[0], str | bytes):  # a descriptor, which was opened before
        return
    path = os.path.realpath(os.fsdecode(arguments[0]))
    within = [folder for folder in (FOLDER, ALLOWED) if f"{path}/".startswith(f"{folder}/")]
    if within == [FOLDER]:
        raise PermissionError(f"{path} is of the checkout, which is out of reach")


sys.addaudithook(refuse)
