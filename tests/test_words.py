"""The field's words, and none of those that stood in their place."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (
    "common",
    "configs",
    "heads",
    "data",
    "eval",
    "train",
    "serve",
    "api",
    "cli",
    "examples",
    "docs",
)

RETIRED = {
    "make_sides": "make_variants", "Side": "DecoderVariant", "Parting": "Divergence",
    "parting": "divergence", "parted_at": "diverged_at", "parted_share": "diverged_share",
    "walk_rounds": "replay_rounds", "walk_texts": "replay_texts", "Walked": "ReplayedText",
    "describe_walked": "describe_replayed", "walked_at": "served_position", "Moment": "DecodeState",
    "Taught": "TeacherSamples", "taught_rows": "sample_teacher_rows", "before_after": "",
    "measure_before": "evaluate_baseline", "measure_again": "evaluate_adapted",
    "alone_in": "lock_folder", "only_one_in": "lock_folder", "is_held": "is_locked",
    "whole_folder": "atomic_folder", "whole_file": "atomic_file", "whole_weights": "full_weights",
    "weights_first": "linear_weights_first", "quick_few_rows": "fast_kernels",
    "single_query_attention": "grouped_query_attention", "judged_on": "eval_sets",
    "obstacles": "incompatibilities", "HOPED": "OPTIMISTIC_PRIOR", "stale_acceptance_length": "",
    "served_config": "TargetConfig", "plain_strides": "fast_kernels",
    "fast_small_batch_linear": "fast_kernels", "fast_grouped_query_attention": "fast_kernels",
}  # fmt: skip
"""Identifier or key -> what took its place; empty: it left the product."""


def test_no_retired_name_stands_in_code_help_or_documents() -> None:
    pattern = re.compile(rf"(?<![\w.-])({'|'.join(map(re.escape, RETIRED))})(?![\w-])")
    files = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "train.py")]
    for folder in FOLDERS:
        for ending in ("py", "md", "jinja", "yaml", "json"):
            files += (ROOT / folder).rglob(f"*.{ending}")
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        if "prompts" not in path.parts
        for name in pattern.findall(path.read_text(encoding="utf-8"))
    }
    assert not found
