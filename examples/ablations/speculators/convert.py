"""Conversations of `headstart regenerate` as the folder that speculators (0.9.0) trains EAGLE-3 on.

    python examples/ablations/speculators/convert.py CONVERSATIONS OUT VERIFIER

VERIFIER gets the target's checkpoint, but for the final norm: speculators multiplies by that weight
as it stands, a Gemma 3 by one more than it says. Stored are the outputs of the layers that it reads
(number 2, the middle one, the third from the end) and of the last layer, before the norm.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from headstart.data.conversations import read_folder
from headstart.heads.loading import load_target
from headstart.heads.target import Target

NORM = "model.norm.weight"


def write_verifier(target: Target, folder: Path) -> None:
    target.model.save_pretrained(folder)
    target.tokenizer.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights[NORM] = (weights[NORM].float() + 1).to(weights[NORM].dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_texts(target: Target, conversations: Path, out: Path) -> None:
    count = len(target.layers)
    read = [2, count // 2, count - 3, count - 1]
    (out / "hidden_states").mkdir(parents=True)
    rows: dict[str, list[object]] = {"input_ids": [], "loss_mask": [], "seq_len": []}
    used = torch.zeros(len(target.table), dtype=torch.long)
    for number, conversation in enumerate(read_folder(conversations)):
        ids, mask = torch.tensor(conversation.ids), torch.zeros(len(conversation.ids)).bool()
        for start, end in conversation.spans:
            mask[start:end] = True
        used += torch.bincount(ids[mask], minlength=len(used))
        layers = target.activations(ids[None], layers=read).layers
        states = torch.stack([layers[i][0] for i in read], dim=1).bfloat16()
        file = out / "hidden_states" / f"hs_{number}.safetensors"
        save_file({"hidden_states": states.contiguous(), "token_ids": ids}, file)
        for name, value in zip(rows, (conversation.ids, mask.tolist(), len(ids)), strict=True):
            rows[name].append(value)
    Dataset.from_dict(rows).with_format("torch").save_to_disk(str(out / "rows"))
    for path in (out / "rows").iterdir():
        path.rename(out / path.name)
    torch.save(dict(enumerate(used.tolist())), out / "token_freq.pt")  # as speculators reads it
    (out / "info.json").write_text(json.dumps({"layers": read, "texts": len(rows["seq_len"])}))


if __name__ == "__main__":
    conversations, out, verifier = map(Path, sys.argv[1:])
    target = load_target("gemma3-270m", dtype="bfloat16")
    if not verifier.exists():
        write_verifier(target, verifier)
    write_texts(target, conversations, out)
