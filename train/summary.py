"""What a run came to: summary.json, and a few lines for the terminal."""

import json
from typing import Any

from headstart.configs.schema import Config
from headstart.data.store import Documents
from headstart.eval.environment import environment
from headstart.eval.recall import RecallCounts
from headstart.heads.files import write_atomically
from headstart.heads.targets import Target
from headstart.heads.unroll import DraftHead
from headstart.train.run_folder import read_metrics


def write_summary(
    config: Config,
    head: DraftHead,
    target: Target,
    training: Documents,
    validation: Documents,
    start: float,
    ordered: dict[str, Any] | None,
) -> dict[str, Any]:
    """Write `summary.json` into the run folder.

    Args:
        config: the resolved configuration.
        head: as trained.
        target: that it was distilled from.
        training, validation: what it was trained and validated on.
        start: acceptance length before training, of a head that was finished; 0: there was none.
        ordered: acceptance lengths and recall of its ordered embeddings, where it got some.

    Returns:
        The content: `best`, the validation that the head in `head/` comes from; all `validations`;
        data, sizes, environment and configuration.
    """
    rows = read_metrics(config.run.dir)
    validations = [{"step": 0, "acceptance_length": start}] if start else []
    validations += [
        {key: row[key] for key in ("step", "acceptance_length")}
        for row in rows
        if "acceptance_length" in row
    ]
    best = max(validations, key=lambda row: row["acceptance_length"])
    content = {
        "best": best | (ordered or {}),
        "validations": validations,
        "loss": rows[-1]["loss"],
        "parameters_trained": sum(p.numel() for p in head.trainable().values()),
        "data": {
            "documents": len(training.entries),
            "answer_tokens": sum(entry.trained for entry in training.entries),
            "validation_documents": len(validation.entries),
            "validation_answer_tokens": sum(entry.trained for entry in validation.entries),
        },
        "environment": environment(target.device) | {"target": target.name},
        "config": config.model_dump(mode="json"),
    }
    write_atomically(config.run.dir / "summary.json", json.dumps(content, indent=2) + "\n")
    return content


def summary_text(row: dict[str, Any]) -> str:
    """One or two lines of a validation: acceptance lengths, and the recall of the clusters."""
    text = f"acceptance length {row['acceptance_length']:.3f}"
    if "recall" not in row:
        return text
    tops = " / ".join(RecallCounts.tops())
    shares = {
        kind: " / ".join(f"{share:.3f}" for share in row["recall"][kind].values())
        for kind in ("argmax", "mass")
    }
    return (
        f"{text} (dense {row['dense_acceptance_length']:.3f}); in the top {tops} clusters: the "
        f"teacher's best token {shares['argmax']}, its mass {shares['mass']}"
    )
