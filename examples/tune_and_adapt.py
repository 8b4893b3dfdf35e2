"""The whole story on two CPU cores: tune Gemma 3 270M with LoRA on one kind of work, then let the
draft head that fitted it follow.

    headstart train --config gemma3-270m                     # or any head of the plain target
    python examples/tune_and_adapt.py --head runs/gemma3-270m/head --domain math --steps 100

The tuning is the few lines of `tune`; yours comes from wherever you tune. What follows it is one
command, which the script prints before it runs it. The figures are in OUT/OUT.json in the end.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence

from headstart.cli.main import main
from headstart.common.console import progress_bar
from headstart.data.prompts import load_prompts
from headstart.data.templates import encode_conversation
from headstart.heads.loading import load_target
from headstart.heads.target import Target

PROMPTS = Path(__file__).resolve().parents[1] / "data" / "prompts" / "chat_train.jsonl"
LONGEST = 256  # tokens of a conversation that is tuned on


def write_prompts(domain: str, out: Path) -> tuple[Path, Path, Path]:
    """Half of the domain's prompts that have a response, to tune on; all others of the domain, and
    all of other domains, which need none."""
    rows = list(map(json.loads, PROMPTS.read_text(encoding="utf-8").splitlines()))
    own = [row for row in rows if row["category"] == domain]
    tuned = [row for row in own if row.get("response")][::2]
    if not tuned:
        raise SystemExit(f"{PROMPTS} has no responses of the category {domain}: try math or code")
    seen = {row["id"] for row in tuned}
    parts = {
        f"{domain}-tuned": tuned,
        domain: [row for row in own if row["id"] not in seen],
        "general": [row for row in rows if row["category"] != domain],
    }
    for name, part in parts.items():
        keys = ("id", "category", "prompt", "response")  # each is a source of its own
        lines = [json.dumps({k: row[k] for k in keys if k in row}) + "\n" for row in part]
        (out / f"{name}.jsonl").write_text("".join(lines))
    tuned_on, unseen, general = (out / f"{name}.jsonl" for name in parts)
    return tuned_on, unseen, general


def tune(target: Target, texts: Path, steps: int, batch: int, rate: float, out: Path) -> None:
    """LoRA on the linear layers of the target; the loss is on the responses alone."""
    rows = [
        (ids, spans)
        for prompt in load_prompts(texts)
        for ids, spans in [encode_conversation(prompt, target.tokenizer, target.eos_ids)]
        if len(ids) <= LONGEST
    ]
    torch.manual_seed(0)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(target.model, lora)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    with progress_bar() as bar:
        task = bar.add_task("Tuning", total=steps, status="")
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 10) * (1 - step / steps)
            ids, spans = zip(*(rows[i] for i in torch.randint(len(rows), (batch,))), strict=True)
            # Padding comes last, where nothing that is taught can see it.
            inputs = pad_sequence([torch.tensor(row) for row in ids], True).to(target.device)
            hidden = model.base_model.model.model(inputs, use_cache=False).last_hidden_state
            taught = [(row, t) for row in range(batch) for a, b in spans[row] for t in range(a, b)]
            row, t = torch.tensor(taught, device=target.device).T
            logits = target.model.lm_head(hidden[row, t - 1]).float()
            loss = torch.nn.functional.cross_entropy(logits, inputs[row, t])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.update(task, advance=1, status=f"loss {loss:.3f}")
    model.save_pretrained(str(out))


def run() -> int:
    """Tune, then adapt."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--target", default="gemma3-270m")
    add("--head", required=True, help="a draft head of the plain target")
    add("--domain", default="math", help="category of data/prompts/chat_train.jsonl: math or code")
    add("--steps", type=int, default=100, help="strength of the tuning (default 100)")
    add("--batch", type=int, default=4, help="conversations a step of it (default 4)")
    add("--rate", type=float, default=3e-4, help="learning rate of it (default 3e-4)")
    add("--tuned", type=Path, metavar="ADAPTER", help="of an earlier run, in place of tuning")
    add("--budget", default="20m", help="of the adaptation (default 20m)")
    add("--out", type=Path, help="default runs/adapt-DOMAIN-STEPS")
    args, rest = parser.parse_known_args()  # the rest goes to `headstart adapt`
    out = args.out or Path(f"runs/adapt-{args.domain}-{args.steps}")
    out.mkdir(parents=True, exist_ok=True)
    tuned_on, unseen, general = write_prompts(args.domain, out)
    adapter = args.tuned or out / "lora"
    note = adapter / "tuning.json"
    if args.tuned is None:
        tuning = {name: getattr(args, name) for name in ("domain", "steps", "batch", "rate")}
        if not note.is_file():
            tune(load_target(args.target), tuned_on, args.steps, args.batch, args.rate, adapter)
            note.write_text(json.dumps(tuning))
        elif (there := json.loads(note.read_text())) != tuning:
            raise SystemExit(f"{adapter} was tuned with {there}, now {tuning}: name another --out")
    command = [
        "adapt", args.head, f"target.name={args.target}", f"target.adapters={adapter}",
        f"data.prompts={unseen}", f"adapt.general_prompts={general}",
        f"adapt.budget={args.budget}", f"output_dir={out / 'adapted'}", *rest,
    ]  # fmt: skip
    print("$ headstart " + shlex.join(command), flush=True)
    ran, sys.argv = shlex.join(["python", *sys.argv]), ["headstart", *command]
    if (code := main(command)) == 0:
        content = json.loads((out / "adapted" / "adapt.json").read_text(encoding="utf-8"))
        tuning = json.loads(note.read_text()) if note.is_file() else None
        content |= {"tuning": tuning, "commands": [ran, *content["commands"]]}
        (out / f"{out.name}.json").write_text(json.dumps(content, indent=1) + "\n")
        print(f"Written: {out / f'{out.name}.json'}")
    return code


if __name__ == "__main__":
    sys.exit(run())
