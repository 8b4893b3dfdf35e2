"""A whole run: train the head, then measure it."""

import gc
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from headstart.configs.schema import Config, EvalConfig
from headstart.eval.asked import asked_by_run
from headstart.eval.report import run_evaluation
from headstart.heads.loading import load_served
from headstart.heads.saving import load_assistant
from headstart.train.loop import train
from headstart.train.run_folder import run_folder
from headstart.train.tracking import log_report


def run(config: Config, resume: bool = False) -> None:
    """Train into `config.run.dir`, then evaluate its best head as `config.eval` says.

    The reports land in `eval/` (in the target's dtype) and, unless that is float32 already, in
    `eval/exact/` (float32, where every text must equal plain greedy decoding).

    Raises:
        RuntimeError: it does not.
    """
    train(config, resume)
    if config.eval is not None and PartialState().is_main_process:
        with run_folder(config.run.dir, "evaluating"):
            _evaluate(config, config.eval, PartialState().device)


def _evaluate(config: Config, chosen: EvalConfig, device: torch.device) -> None:
    folder = config.run.dir / "eval"
    content = _measure(config, config.target.dtype, chosen, folder, device)
    log_report(config, content)
    if config.target.dtype == "float32":
        _check_lossless(content, folder)
    elif chosen.exact_limit:
        longest = [max(chosen.num_assistant_tokens)]
        few = {"limit": chosen.exact_limit, "num_assistant_tokens": longest}
        exact = folder / "exact"
        content = _measure(config, "float32", chosen.model_copy(update=few), exact, device)
        _check_lossless(content, exact)


def _measure(
    config: Config, dtype: str, what: EvalConfig, out: Path, device: torch.device
) -> dict[str, Any]:
    """Evaluate the run's best head in a dtype: what the report holds."""
    # The target of before, on a large one's GPU, would leave no room for this one.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    target = load_served(config.target.model_copy(update={"dtype": dtype}), device)
    head = config.run.dir / "head"
    assistant = load_assistant(head, getattr(torch, dtype), device)
    asked = asked_by_run(config.data)
    return run_evaluation(target, {str(head): assistant}, what, out, asked=asked)


def _check_lossless(content: dict[str, Any], out: Path) -> None:
    """Raise `RuntimeError` where a text of a float32 evaluation parts from plain decoding."""
    parted = [p for r in content["results"] for p in r["parted"] if not p["within_rounding"]]
    if parted:
        gap = max(p["top2_logit_gap"] for p in parted)
        raise RuntimeError(
            f"assisted decoding gave other text than plain decoding in float32, at a logit gap "
            f"of {gap:.3g}: this is a fault, see {out / 'report.json'}"
        )
