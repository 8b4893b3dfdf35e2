"""What tests of publishing have too."""

from tests.eval.conftest import hub

__all__ = ["hub"]
