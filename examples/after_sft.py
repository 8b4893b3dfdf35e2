"""Fine-tune a Gemma with LoRA and give the tuned model its draft head, in one process.

    python examples/after_sft.py                    # Gemma 3 270M (extra `demo`)
    python examples/after_sft.py --target ORG/my-gemma --out runs/tuned

The tuning is trl's `SFTTrainer` where trl is installed, else transformers' `Trainer` over the same
rows. What comes after it is one call on what is then in memory.
"""

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from headstart.api import TrainedHead, train_head
from headstart.configs.schema import Config, DataConfig, EvalConfig, TrainConfig
from headstart.heads.gemma3_270m import gemma3_270m_dir
from headstart.heads.loading import TINY_TARGETS, byte_tokenizer, tiny_target

PROMPTS = Path(__file__).resolve().parents[1] / "data" / "prompts" / "chat_train.jsonl"
LAYERS = ["q_proj", "v_proj", "up_proj", "down_proj"]  # that LoRA is put beside
LONGEST = 256  # tokens of a row that is tuned on


def load_rows(category: str, most: int) -> Dataset:
    """The questions of a category that have an answer, and the answers."""
    rows = map(json.loads, PROMPTS.read_text(encoding="utf-8").splitlines())
    found = [
        {"prompt": row["prompt"], "completion": " " + row["response"]}
        for row in rows
        if row["category"] == category and row.get("response")
    ]
    return Dataset.from_list(found[:most])


def load(name: str) -> tuple[Any, Any]:
    """A model to tune, in float32, and its tokenizer."""
    if name in TINY_TARGETS:
        return tiny_target(name), byte_tokenizer()
    place = gemma3_270m_dir() if name == "gemma3-270m" else name
    model = AutoModelForCausalLM.from_pretrained(place, dtype="float32")
    return model, AutoTokenizer.from_pretrained(place)


def tune(model: Any, tokenizer: Any, rows: Dataset, steps: int, folder: str) -> Any:
    """The `PeftModel` that a trainer makes of a model."""
    common: dict[str, Any] = {
        "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": 4,
        "learning_rate": 3e-4, "bf16": False, "logging_steps": 20, "report_to": "none",
        "save_strategy": "no", "seed": 0,
    }  # fmt: skip
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=LAYERS, task_type="CAUSAL_LM")
    if find_spec("trl") is not None:
        from trl import SFTConfig, SFTTrainer

        print("Tuning with trl's SFTTrainer", flush=True)
        args = SFTConfig(**common, max_length=LONGEST)
        trainer = SFTTrainer(
            model, args, train_dataset=rows, processing_class=tokenizer, peft_config=lora
        )
    else:
        print("Tuning with transformers' Trainer: trl is not installed", flush=True)

        def encode(row: dict[str, str]) -> dict[str, list[int]]:
            asked = tokenizer(row["prompt"])["input_ids"]
            ids = asked + tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
            ids = [*ids, tokenizer.eos_token_id][:LONGEST]
            labels = [-100] * len(asked) + ids[len(asked) :]  # the loss is on the answer alone
            return {"input_ids": ids, "labels": labels[:LONGEST]}

        trainer = Trainer(
            get_peft_model(model, lora),
            TrainingArguments(**common),
            train_dataset=rows.map(encode, remove_columns=rows.column_names),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
        )
    trainer.train()
    return trainer.model


def run(words: list[str] | None = None) -> TrainedHead:
    """Tune, then train the head of what was tuned."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--target", default="gemma3-270m", help="built-in name, folder or Hub id of a Gemma")
    add("--category", default="math", help="of data/prompts/chat_train.jsonl: math or code")
    add("--rows", type=int, default=512, help="that are tuned on and asked (default 512)")
    add("--steps", type=int, default=60, help="of the tuning (default 60)")
    add("--head-steps", type=int, default=400, help="of the head's training (default 400)")
    add("--new-tokens", type=int, default=64, help="of an answer (default 64)")
    add("--out", type=Path, help="run folder of the head (default: nothing is written)")
    args = parser.parse_args(words)

    rows = load_rows(args.category, args.rows).train_test_split(test_size=16, seed=0)
    model, tokenizer = load(args.target)
    with TemporaryDirectory() as folder:
        model = tune(model, tokenizer, rows["train"], args.steps, folder)

    config = Config(
        data=DataConfig(
            max_prompt_tokens=LONGEST, max_new_tokens=args.new_tokens, validation_conversations=16
        ),
        train=TrainConfig(
            max_steps=args.head_steps, warmup_steps=min(30, args.head_steps // 10),
            batch_size=4, multi_step_anchors=16, num_speculative_steps=3, eval_steps=100,
        ),
        eval=EvalConfig(
            num_assistant_tokens=[4], decoders=["exact"], max_new_tokens=args.new_tokens, limit=8
        ),
    )  # fmt: skip
    head = train_head(
        model, tokenizer, rows["train"], config, eval_data=rows["test"], output_dir=args.out
    )
    assert head.report is not None, "config.eval asks for one"
    held_out, decoded = head.summary["best"], head.report["results"][0]
    print(f"Acceptance length on held-out answers: {held_out['acceptance_length']:.2f}")
    print(f"Acceptance length when decoding, K = 4: {decoded['acceptance_length']:.2f}")
    return head


if __name__ == "__main__":
    run()
