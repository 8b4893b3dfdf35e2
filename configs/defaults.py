"""Defaults of commands that are not the schema's, in a file that loads nothing."""

ADAPT = (
    ("head.on_existing_clusters", "keep"),  # minutes that steps use better
    ("train.max_steps", 20000),  # time ends it
    ("train.batch_size", 4),
    ("train.multi_step_anchors", 32),
    ("train.learning_rate", 5e-4),
    ("train.eval_steps", 100),
    ("train.early_stopping_patience", 4),
    ("data.max_new_tokens", 96),
    ("data.max_prompt_tokens", 256),
    ("eval.num_assistant_tokens", [4]),
)
"""Of `headstart adapt`: the reference recipe's, at half its learning rate, since the head is
finished."""
