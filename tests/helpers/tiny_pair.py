"""Tiny targets and draft heads for them, trained from nothing on text in a minute or two: they
agree often enough, and not always, that an engine's acceptance means something.

Kinds: of Gemma 4 `shared` (KV sharing, per-layer embeddings, soft cap) and `plain` (none of them),
`wide`, a plain one whose rows are long enough for all of llama.cpp's quantizations, and `gemma3`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    Gemma3ForCausalLM,
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from headstart.configs.loader import load_config
from headstart.heads.loading import gemma3_config, gemma4_text_config
from headstart.train.run import train

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ROOT / "data" / "prompts" / "text_train.jsonl"
GEMMA4 = ("shared", "plain")
KINDS = (*GEMMA4, "gemma3")
VOCABULARY = 512
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 32,  # a size that engines have kernels for
    "sliding_window": 64,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
OF_GEMMA4: dict[str, Any] = {
    "global_head_dim": 64,
    "rope_parameters": {
        "full_attention": {
            "rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}  # fmt: skip
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
SHARED = {
    "num_kv_shared_layers": 3,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": VOCABULARY,
}


def texts() -> list[str]:
    """The plain text of the repository's training prompts."""
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    rows = map(json.loads, lines)
    return [row["prompt"] + (row.get("response") or "") for row in rows]


def tokenizer_of(training: list[str]) -> PreTrainedTokenizerFast:
    """A small one of Gemma's kind: BPE over pieces that begin with ▁, bytes where it has none."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, limit_alphabet=100, show_progress=False,
        special_tokens=[*specials, *(f"<0x{byte:02X}>" for byte in range(256))],
    )  # fmt: skip
    tokenizer.train_from_iterator(training, trainer)
    # The trainer makes control tokens of the bytes, which no text may hold.
    content = json.loads(tokenizer.to_str())
    added = content["added_tokens"]
    content["added_tokens"] = [one for one in added if not one["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    names = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), specials, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def write_target(kind: str, folder: Path, steps: int = 500, seed: int = 0) -> None:
    """Train a target on the texts and save it, in float32."""
    torch.manual_seed(seed)
    training = texts()
    tokenizer = tokenizer_of(training)
    stream = [i for text in training for i in tokenizer(text)["input_ids"]]
    ids = torch.tensor(stream[: len(stream) // 128 * 128]).view(-1, 128)
    shared = SHARED if kind == "shared" else {"final_logit_softcapping": None}
    model: Any
    if kind == "gemma3":
        model = Gemma3ForCausalLM(gemma3_config(**SHAPE, query_pre_attn_scalar=32))
    else:
        shape = SHAPE | OF_GEMMA4 | (WIDE if kind == "wide" else {}) | shared
        model = Gemma4ForCausalLM(gemma4_text_config(**shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - 0.9 * step / steps)
        batch = ids[torch.randint(len(ids), (16,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"{kind}: loss {loss:.3f} after {steps} steps")
    model.generation_config.bos_token_id, model.generation_config.eos_token_id = 2, 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_head(target: Path, run: Path) -> Path:
    """Train a head for it, narrower than the target and with a dense LM head: every engine takes
    such a one. Returns its folder."""
    train(load_config(ROOT / "configs" / "tiny.yaml", [
        f"output_dir={run}", f"target.name={target}", "target.dtype=float32",
        f"data.prompts=[{PROMPTS}]", "data.num_conversations=256", "data.max_prompt_tokens=64",
        "data.max_new_tokens=64", "data.generation_batch_size=64", f"data.cache_dir={run}-data",
        "head.use_ordered_embeddings=false", "head.num_centroids=null", "head.hidden_size=64",
        "train.max_steps=400", "train.batch_size=8", "train.num_speculative_steps=4",
        "train.max_anchors=32", "train.likely_tokens=256", "train.eval_steps=200",
        "train.save_steps=400", "eval=null",
    ]))  # fmt: skip
    return run / "head"


def write_pair(kind: str, folder: Path) -> tuple[Path, Path]:
    """Target and head, made once: their folders."""
    target, run = folder / kind / "target", folder / kind / "run"
    if not (run / "head" / "config.json").is_file():
        write_target(kind, target)
        write_head(target, run)
    return target, run / "head"


def write_multimodal(target: Path, folder: Path) -> Path:
    """The same target as a multimodal Gemma 4, with a tower of noise that no text reads."""
    model: Any = Gemma4ForCausalLM.from_pretrained(target, dtype=torch.float32)
    config = Gemma4Config(
        text_config=model.config.to_dict(), audio_config=None,
        vision_config={
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
        },
    )  # fmt: skip
    whole: Any = Gemma4ForConditionalGeneration(config)
    whole.model.language_model.load_state_dict(model.model.state_dict())
    whole.tie_weights()
    whole.generation_config = model.generation_config
    whole.save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(target).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    import sys

    for kind in KINDS:
        target, head = write_pair(kind, Path(sys.argv[1]))
        print(target, head)
        if kind in GEMMA4:
            print(write_multimodal(target, target.with_name("multimodal")))
