"""Commands and flags of before: each is refused with what it is called now."""

from collections.abc import Sequence

COMMANDS = {
    "heads describe": "describe",
    "heads order": "order",
    "data inspect": "inspect",
    "engines install": "install",
}
"""Two words then -> one now."""
FLAGS = {
    "--adapter": "target.adapters=ADAPTER",
    "--api-key-env": "server.api_key_env=NAME",
    "--base": "adapt.base=NAME",
    "--base-head": "publish.base_head=ORG/NAME",
    "--base-model": "publish.base_models=ORG/NAME",
    "--branch": "publish.branch=NAME",
    "--budget": "adapt.budget=TIME",
    "--concurrency": "server.concurrency=N",
    "--context": "bench.context=N",
    "--conversations": "an argument: headstart extract CONVERSATIONS",
    "--decoded": "adapt.decoded_prompts=N",
    "--decoders": "eval.decoders=NAME,NAME",
    "--dense": "export.dense=true",
    "--draft-model": "eval.draft_models=NAME",
    "--dry-run": "--plan",
    "--dtype": "target.dtype=NAME (of headstart export: export.dtype=NAME)",
    "--engine": "an argument: headstart serve-check HEAD ENGINE",
    "--examples": "an argument: headstart inspect PATH N",
    "--extract": "headstart extract, without conversations",
    "--general": "adapt.general_prompts=SET",
    "--general-share": "adapt.general_share=S",
    "--head": "an argument: headstart COMMAND HEAD",
    "--held-out": "adapt.held_out_prompts=N",
    "--keep-adapters": "target.merge_adapters=false",
    "--language": "publish.languages=CODE",
    "--license": "publish.license=NAME",
    "--limit": "eval.limit=N",
    "--max-new-tokens": "eval.max_new_tokens=N",
    "--measure-only": "adapt.measure_only=true",
    "--merged": "publish.merge_adapter=true",
    "--model": "server.model=NAME",
    "--num-assistant-tokens": "eval.num_assistant_tokens=K,K",
    "--num-centroids": "head.num_centroids=N",
    "--out": "output_dir=DIR",
    "--pr": "publish.create_pr=true",
    "--prompts": "eval.prompts=SET (adapt, check: data.prompts=SET; bench: bench.prompts=N)",
    "--public": "publish.private=false",
    "--quantization": "target.quantization=NAME",
    "--rebuild": "head.on_existing_clusters=rebuild",
    "--repo-id": "an argument: headstart publish RUN ORG/NAME",
    "--report": "publish.report=DIR",
    "--revision": "target.revision=NAME",
    "--rope-position": "simulate.draft_position_offset=0 (newest) or -1 (one_earlier)",
    "--server": "server.url=URL",
    "--simulate": "headstart simulate STORE HEAD",
    "--steps": "train.max_steps=N (of headstart order: head.centroid_steps=N)",
    "--target": "target.name=NAME",
    "--temperature": "eval.temperatures=T,T",
    "--to": "an argument: headstart export HEAD ENGINE",
    "--top-k": "eval.top_k=N (of headstart order: head.centroid_intermediate_top_k=N)",
    "--top-p": "eval.top_p=P",
    "--trust-remote-code": "target.trust_remote_code=true",
    "--without-texts": "publish.include_texts=false",
}
"""Flag then -> setting, argument or command now."""


def renamed_flags(words: Sequence[str]) -> list[str]:
    """What to say of each flag of before among the words of a command line."""
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    return [f"{flag} is now {FLAGS[flag]}" for flag in flags if flag in FLAGS]


def renamed_command(words: Sequence[str]) -> str | None:
    """What to say of a command of before, of which these are the words; None: it is none."""
    now = COMMANDS.get(" ".join(words[:2]))
    return None if now is None else f"headstart {' '.join(words[:2])} is now headstart {now}"
