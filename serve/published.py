"""What the report says that a head was published with: the acceptance that a server is held to."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from headstart.eval.compare import ENOUGH, read_report
from headstart.eval.page import OF_HEADS, decoder_name
from headstart.heads.adapters import split_revision
from headstart.serve.hub import REFUSALS, is_hub_id
from headstart.serve.publish import EVALUATION


@dataclass(frozen=True)
class Published:
    """Acceptance of one variant of a report, over all of its texts."""

    name: str
    """Head, decoder, K and temperature, in words."""
    greedy: bool
    """Whether the texts of the report were greedy."""
    rates: list[float]
    """[K] conditional acceptance."""
    lower: list[float]
    """[K] the lower ends of its 95% intervals."""
    rounds_per_text: float
    unevenness: float
    """The length of a text in rounds that a round's own text has on average, in mean lengths: 1
    where all texts are as long."""
    likeness: float
    """Correlation of rounds of one text in how many tokens they accept, 0 to 1."""

    def up_to(self, k: int) -> "Published":
        """Of drafts 1 .. k alone."""
        return replace(self, rates=self.rates[:k], lower=self.lower[:k])

    def design_effect(self, rounds_per_text: float | None) -> float:
        """How many times as much sums over rounds vary as if rounds were independent, where texts
        have so many on average (None: as many as in the report) that are as alike, and as uneven
        in length, as those of the report."""
        length = self.rounds_per_text if rounds_per_text is None else rounds_per_text
        return 1 + max(length * self.unevenness - 1, 0) * self.likeness


def published_report(head: str) -> dict[str, Any]:
    """The report of a head.

    Args:
        head: a report.json, the folder of one, of a run or of its head, or of the Hub, ORG/NAME or
            ORG/NAME@REVISION, as `headstart publish` writes it.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    there = Path(head)
    if there.is_file():
        return read_report(there)
    if there.is_dir():
        # Beside the head; as published; the run's, `adapt` included, whose run lies within.
        places = [there, there / EVALUATION, there / "eval"]
        if there.name == "head":
            places += [there.parent / "eval"]
        if there.absolute().parts[-2:] == ("run", "head"):
            places += [there.parent.parent / "eval"]
        for place in places:
            if (place / "report.json").is_file():
                return read_report(place / "report.json")
        raise ValueError(
            f"no report.json in {there}, nor in {EVALUATION}/ or eval/ there: name the report "
            "itself, or measure the head with `headstart eval`"
        )
    if not is_hub_id(head):
        raise ValueError(f"{head} is no file, no folder and no ORG/NAME of the Hub")
    name, revision = split_revision(head)
    file = f"{EVALUATION}/report.json"
    try:
        return read_report(Path(hf_hub_download(name, file, revision=revision)))
    except (*REFUSALS, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{name} on the Hub has no {file} to be read: {reason}") from error


def choose_published(
    report: dict[str, Any],
    place: str,
    k: int | None,
    head: str | None = None,
    temperature: float | None = None,
) -> Published:
    """The variant of a report to hold a server to: of its head, at the server's temperature, the
    clean-KV decoder before transformers' own, with the server's K or else the nearest larger, or
    the largest.

    Args:
        report: content of report.json.
        place: where it was found: a head of that name is taken where the report has several.
        k: K of the server; None: not known.
        head: its name in the report; None: there is one, or one that is named as `place`.
        temperature: of the server's texts; None: the highest that was measured, at which the least
            is accepted.

    Raises:
        ValueError: it has no such variant, or those of several heads.
    """
    found = [r for r in report["results"]
             if r["head"] and r["decoder"] in OF_HEADS and r.get("per_text")]  # fmt: skip
    if not found:
        raise ValueError(
            f"the report has no head measured with the decoder {' or '.join(OF_HEADS)}: measure it "
            f"with eval.decoders={OF_HEADS[0]}"
        )
    found = _only(found, "head", head, place)
    temperatures = [result["temperature"] for result in found]
    found = _only(found, "temperature", temperature, max(temperatures))

    def distance(result: dict[str, Any]) -> tuple[Any, ...]:
        drafts = result["num_assistant_tokens"]
        shorter = k is not None and drafts < k
        off = -drafts if k is None or shorter else drafts
        return shorter, off, OF_HEADS.index(result["decoder"])

    result = min(found, key=distance)
    columns = report["per_text_columns"]
    rounds, accepted = (
        [row[columns.index(name)] for row in result["per_text"]] for name in ("rounds", "accepted")
    )
    drafts, total = result["num_assistant_tokens"], sum(rounds)
    return Published(
        f"{result['head']}, {decoder_name(result)}, K = {drafts}",
        not result["temperature"],
        list(result["conditional_acceptance_rate"]),
        [low for low, _ in result["conditional_acceptance_rate_interval"]],
        total / max(len(rounds), 1),
        sum(n * n for n in rounds) * len(rounds) / max(total, 1) ** 2,
        likeness(rounds, accepted, result["accepted_histogram"]),
    )


def _only(
    found: list[dict[str, Any]], key: str, wanted: str | float | None, otherwise: str | float
) -> list[dict[str, Any]]:
    """The results that have what is wanted; where nothing is, those that have `otherwise`, or all
    of them if they agree."""
    values = sorted({result[key] for result in found})
    listed = ", ".join(map(str, values))
    if wanted is not None and wanted not in values:
        raise ValueError(f"watch.{key}={wanted} is not in the report, which has {listed}")
    value = otherwise if wanted is None else wanted
    if value in values:
        return [result for result in found if result[key] == value]
    if len(values) > 1:
        raise ValueError(f"the report is of {listed}: name one with watch.{key}=...")
    return found


def likeness(rounds: Sequence[int], accepted: Sequence[int], histogram: Sequence[int]) -> float:
    """The correlation between rounds of one text, from the design effect of the texts as clusters.

    Args:
        rounds, accepted: of each text.
        histogram: [K + 1] rounds of all texts that accepted 0 .. K tokens.

    Returns:
        0 to 1. Fewer than `ENOUGH` texts tell nothing, and count as one round each: 1.
    """
    texts = [(n, a) for n, a in zip(rounds, accepted, strict=True) if n]
    total, longest = sum(n for n, _ in texts), max((n for n, _ in texts), default=0)
    if len(texts) < ENOUGH or longest < 2:
        return 1.0
    mean = sum(a for _, a in texts) / total
    counted = sum(histogram)
    mean_of_rounds = sum(n * count for n, count in enumerate(histogram)) / counted
    variance = sum(n * n * count for n, count in enumerate(histogram)) / counted - mean_of_rounds**2
    if not variance:
        return 0.0
    between = sum((a - mean * n) ** 2 for n, a in texts) * len(texts) / (len(texts) - 1)
    # Of texts of unequal length the mean length is weighted by itself.
    weighted = sum(n * n for n, _ in texts) / total
    return min(1.0, max(0.0, (between / total / variance - 1) / (weighted - 1)))
