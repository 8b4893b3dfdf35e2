"""What tests of publishing have too."""

from tests.eval.conftest import finished_run, hub

__all__ = ["finished_run", "hub"]
