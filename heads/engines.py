"""What serving engines ask of a draft head, beyond what transformers asks.

Seen with transformers 5.22, vLLM's CPU build 0.32, llama.cpp through xllamacpp and mlx-vlm 0.7.10;
docs/serving.md has how.
"""

from typing import Any, Literal, get_args

from headstart.configs.schema import Engine
from headstart.heads.export import rope_position

ENGINES: tuple[Engine, ...] = get_args(Engine)
VLLM = "serve it with vLLM"  # which drafts for Gemma 3 too
ROPE_POSITIONS: dict[Engine, Literal["newest", "one_earlier"]] = {
    "transformers": "newest", "llama.cpp": "newest", "vllm": "one_earlier", "mlx": "one_earlier",
}  # fmt: skip
"""Where each puts the drafts of a round (`TrainConfig.rope_position`)."""


def obstacles(engine: Engine, head: Any, target: Any) -> list[str]:
    """Why an engine would refuse a head, one line each, with the cure; empty: it takes it.

    Args:
        engine: that is to serve.
        head: configuration of a head in the native format.
        target: configuration of its target (`load_target_config`), whole, not its text part alone.
    """
    found = []
    text = head.text_config
    if missing := {"sliding_attention", "full_attention"} - set(text.layer_types):
        found.append(
            f"the head has no {' and no '.join(sorted(missing))} layer, and every engine wants one "
            "of each: train one with head.num_hidden_layers=2 or more"
        )
    if text.num_kv_shared_layers != text.num_hidden_layers:
        found.append(
            f"num_kv_shared_layers is {text.num_kv_shared_layers} where the head has "
            f"{text.num_hidden_layers} layers: all of them have to read the target's keys"
        )
    if getattr(text, "hidden_size_per_layer_input", 0):
        found.append("hidden_size_per_layer_input is not 0: a head has no inputs per layer")
    if not head.tie_word_embeddings:
        found.append(
            "the LM head is a table of its own, and engines read the embeddings for it: train a "
            "head with Headstart, whose tables are tied"
        )
    match engine:
        case "llama.cpp":
            found += _llama_cpp(head, target)
        case "mlx":
            if target.model_type not in ("gemma4", "gemma4_unified"):
                gemma4 = target.model_type.startswith("gemma4")
                cure = "save it as Gemma4ForConditionalGeneration" if gemma4 else VLLM
                found.append(
                    f"mlx-vlm drafts for multimodal Gemma 4 targets alone, and this one is a "
                    f"{target.model_type}: {cure}"
                )
    return found


def remarks(engine: Engine, head: Any) -> list[str]:
    """What an engine does with a head that it takes, where its user should know: a line each."""
    found, trained = [], rope_position(head)
    if trained not in ("both", ROPE_POSITIONS[engine]):
        how = {"newest": "at the newest token", "one_earlier": "one before the newest token"}
        found.append(
            f"{engine} puts drafts {how[ROPE_POSITIONS[engine]]} (RoPE), and this head was trained "
            f"for drafts {how[trained]}: fewer of them are accepted (docs/recipe.md)"
        )
    if head.use_ordered_embeddings and engine == "llama.cpp":
        found.append("llama.cpp ignores ordered embeddings: each draft reads the whole table")
    if head.use_ordered_embeddings and engine == "vllm":
        found.append(
            "vLLM's CPU backend cannot read ordered embeddings: for a CPU export with --dense"
        )
    return found


def _llama_cpp(head: Any, target: Any) -> list[str]:
    found = []
    if not target.model_type.startswith("gemma4"):
        found.append(
            f"llama.cpp drafts for Gemma 4 targets alone, and this one is a {target.model_type}: "
            + VLLM
        )
    if head.text_config.hidden_size == head.backbone_hidden_size:
        found.append(
            f"llama.cpp refuses a head as wide as its target ({head.backbone_hidden_size}): train "
            f"one with head.hidden_size={head.backbone_hidden_size // 2}"
        )
    return found
