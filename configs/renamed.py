"""Keys of the configuration that have another name now, and keys that are no more.

A user is told the new name. What a run of an earlier version has saved is a record, which is read
under the names of today: a published head brings its `training_config.yaml` for ever.
"""

from typing import Any

RENAMED = {
    "run.dir": "output_dir",
    "run.seed": "seed",
    "head.start": "head.init_from",
    "head.trains": "head.trainable_modules",
    "head.earlier_clusters": "head.on_existing_clusters",
    "head.lora.rank": "head.lora.r",
    "head.lora.alpha": "head.lora.lora_alpha",
    "head.lora.targets": "head.lora.target_modules",
    "data.only_temperatures": "data.filter.temperatures",
    "data.only_categories": "data.filter.categories",
    "data.only_conversations": "data.filter.num_conversations",
    "train.steps": "train.max_steps",
    "train.pack_tokens": "train.max_packed_length",
    "train.anchors": "train.max_anchors",
    "train.later_anchors": "train.multi_step_anchors",
    "train.rounds": "train.num_speculative_steps",
    "train.round_decay": "train.step_loss_decay",
    "train.rope_position": "train.draft_position_offset",
    "train.patience": "train.early_stopping_patience",
    "train.precision": "train.mixed_precision",
    "train.validate_every": "train.eval_steps",
    "train.checkpoint_every": "train.save_steps",
    "train.keep_checkpoints": "train.save_total_limit",
    "eval.exact_limit": "eval.fp32_check_prompts",
}
VALUES: dict[str, dict[Any, Any]] = {
    "train.precision": {"bfloat16": "bf16", "float32": "no"},
    "train.rope_position": {"newest": 0, "one_earlier": -1, "both": "mixed"},
}
"""Of those whose values have other names too."""
GONE = {"train.trap": None, "head.tie_start": "data"}
"""Settings that are no more, each with the value at which it changed nothing."""


def refuse_renamed(tree: dict[str, Any]) -> None:
    """Raise `ValueError` where a tree of settings has keys of before, with the new name of each."""
    earlier = [(old, new) for old, new in RENAMED.items() if _find(tree, old)]
    if found := [f"{old} is called {new} now{_values(old)}" for old, new in earlier]:
        raise ValueError("; ".join(found))


def _values(old: str) -> str:
    pairs = ", ".join(f"{before}: {now}" for before, now in VALUES.get(old, {}).items())
    return f" ({pairs})" if pairs else ""


def with_new_names(tree: dict[str, Any]) -> dict[str, Any]:
    """A record of an earlier version under the names of today; it changes in place."""
    earlier = [(old, new, found) for old, new in RENAMED.items() if (found := _find(tree, old))]
    for old, new, (section, name) in earlier:
        value = section.pop(name)
        *parents, leaf = new.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        known = VALUES.get(old, {})
        node[leaf] = known.get(value, value) if isinstance(value, str) else value
    for key, neutral in GONE.items():
        if (found := _find(tree, key)) and found[0][found[1]] == neutral:
            del found[0][found[1]]
    if tree.get("run") == {}:
        del tree["run"]
    return tree


def _find(tree: dict[str, Any], key: str) -> tuple[dict[str, Any], str] | None:
    """The section that has a dotted key, and the key's name in it; None: it is not there."""
    *parents, leaf = key.split(".")
    node: Any = tree
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    return (node, leaf) if isinstance(node, dict) and leaf in node else None
