"""`~` in paths, of the command line and of settings alike."""

import os
import re

HOME = re.compile(r"(?:^|(?<=[+=]))~[^/+=]*(?=/|$)")


def expand_home(text: str) -> str:
    """A path with the home folder in place of `~` or `~NAME` at its beginning, where a shell leaves
    it: in quotes, and after the sign in HEAD+ADAPTER and NAME=FILE."""
    return HOME.sub(lambda found: os.path.expanduser(found.group()), text)
