"""What a speculators EAGLE-3 head drafts at every place of converted texts, fed with the text's own
tokens: `python drafts.py RUN/CHECKPOINT DATA OUT.safetensors`, in its environment. Row j of a text
has read x_{j+1}, and its draft k is x_{j+1+k}; K = 8."""

import sys
from pathlib import Path

import torch
from datasets import load_from_disk
from safetensors.torch import load_file, save_file
from speculators.models.eagle3 import Eagle3SpeculatorConfig
from speculators.models.eagle3.core import Eagle3DraftModel
from speculators.models.eagle3.data import shift_batch

head, data, out = map(Path, sys.argv[1:])
config = Eagle3SpeculatorConfig.from_pretrained(str(head))
config.transformer_layer_config._attn_implementation = "sdpa"
model = Eagle3DraftModel.from_pretrained(str(head), config=config).eval()
print("trained parameters:", sum(p.numel() for p in model.parameters() if p.requires_grad))
found = {}
for i in range(len(load_from_disk(str(data)))):
    stored = load_file(data / "hidden_states" / f"hs_{i}.safetensors")
    ids, states = stored["token_ids"], stored["hidden_states"]
    row = shift_batch({
        "input_ids": ids, "hidden_states": states[:, :-1].flatten(1),
        "verifier_last_hidden_states": states[:, -1], "loss_mask": torch.ones_like(ids).bool(),
        "lengths": torch.tensor([len(ids)]), "position_ids": torch.arange(len(ids)),
    })  # fmt: skip
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        drafts = model(
            hidden_states=row["hidden_states"][None], input_ids=row["input_ids"][None],
            document_ids=torch.zeros(1, len(ids) - 1, dtype=torch.long),
            position_ids=row["position_ids"][None], ttt_steps=8,
        )  # fmt: skip
    tokens = torch.stack(drafts, dim=-1)[0]  # in the draft's vocabulary
    tokens = tokens if model.d2t is None else tokens + model.d2t[tokens]
    found[str(i)] = tokens.int().contiguous()
save_file(found, out)
