"""Damage to files and values, and the one way in which it may end: a refusal."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# 1,000 in all, more of what is quick to read.
EACH = settings(
    max_examples=300,
    deadline=60_000,  # ms: a hang, whatever the machine is busy with
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    database=None,
)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.integers(-2, 9)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(
        ["float16", "full_attention", "model", "<start_of_turn>user\n", "\ud800", "~"]
    )
)


VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=8) | st.sampled_from(["role", "content"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)


@contextmanager
def refused_with(name: str) -> Iterator[None]:
    """Within, the one error that may come is a refusal that names the file, or the key."""
    refusal = ""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        refusal = str(error)
    assert not refusal or name in refusal, refusal


def damaged(content: bytes, cuts: tuple[float, float], put: bytes) -> bytes:
    """Bytes with a piece replaced by another; `cuts` are shares of the length."""
    left, right = sorted(int(cut * len(content)) for cut in cuts)
    return content[:left] + put + content[right:]


SHARES = st.tuples(st.floats(0, 1), st.floats(0, 1))


@contextmanager
def replaced(file: Path, content: bytes) -> Iterator[None]:
    """Within, a file has other content; afterwards nothing else is in its folder than before."""
    before, names = file.read_bytes(), sorted(file.parent.iterdir())
    file.write_bytes(content)
    try:
        yield
        assert sorted(file.parent.iterdir()) == names
    finally:
        file.write_bytes(before)
