"""Writes a target and its head into one file of LiteRT-LM: a program for the Python of its
environment, whose torch and transformers are others than Headstart's.

Arguments: a folder and the file to write. The folder holds `export.json` (what `serve/litert.py`
writes), `target` and `head` (config.json and model.safetensors) and `tokenizer.json`; the graphs
are made in it before they are packed.

Four graphs, as the engine's executor calls them: the embedder, the base (`prefill_N`, `decode` and
`verify`), the inputs per layer where the target has them, and the drafter. Each is compared with
the modules that it was made of before it is packed.

Letters: T rows of the cache, N rows of a call, D target width, H head width, V vocabulary,
G key heads, C clusters, M tokens of a cluster.
"""

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import litert_torch
import torch
from ai_edge_litert.interpreter import Interpreter
from litert_lm_builder import litertlm_builder
from litert_lm_builder.runtime.proto import llm_metadata_pb2
from litert_torch.generative.custom_ops.dynamic_update_slice import dynamic_update_slice
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    Gemma3ForCausalLM,
    Gemma4AssistantForCausalLM,
    Gemma4ForCausalLM,
)

NO_ROOM = 74  # how this ends where something cannot be written
HIDDEN = -1e9  # added to the scores of keys that a query does not see, as the engine does
ATTENTION = "by_groups"
# By how much results in float32 may differ, as a share of the largest value: sums are added up in
# another order. What is converted wrongly differs by all of it.
TOLERANCE = 5e-4


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor,
    scaling: float = 1.0, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention over a cache whose values are transposed, as the engine keeps them.

    Query heads that share a key head are rows of one product: with repeated keys, as transformers
    does it, scores are converted wrongly without an error (docs/upstream.md).

    Args:
        query: [1, heads, N, d]. key: [1, G, T, d]. value: [1, G, d, T]. mask: [1, 1, N, T].

    Returns:
        [1, N, heads, d], and no weights.
    """
    heads, rows, width = query.shape[1:]
    share = heads // key.shape[1]
    query = query.reshape(1, key.shape[1], share * rows, width) * scaling
    scores = torch.matmul(query, key.transpose(2, 3)) + torch.cat([mask] * share, dim=2)
    mixed = torch.matmul(torch.softmax(scores, -1), value.transpose(2, 3))
    return mixed.reshape(1, heads, rows, width).transpose(1, 2), None


AttentionInterface.register(ATTENTION, attend)


def name_of(kind: str, layer: int) -> str:
    """What the engine calls a layer's keys (`k`) or values (`v`)."""
    return f"kv_cache_{kind}_{layer}"


class FixedCache:
    """Keys [1, G, T, d] and values [1, G, d, T] of fixed size, into which a call writes its rows
    at `position`; transformers' layers take it for a cache."""

    def __init__(self, states: dict[str, Tensor], position: Tensor):
        self.states, self.position = states, position

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """Write one layer's new rows, key and value [1, G, N, d]."""
        zero, at = torch.zeros_like(self.position), self.position
        k, v = name_of("k", layer), name_of("v", layer)
        self.states[k] = dynamic_update_slice(self.states[k], key, [zero, zero, at, zero])
        turned = value.transpose(2, 3)
        self.states[v] = dynamic_update_slice(self.states[v], turned, [zero, zero, zero, at])
        return self.states[k], self.states[v]


def masks_of(mask: Tensor, input_pos: Tensor, before: int) -> dict[str, Tensor]:
    """The engine's mask [1, 1, N, T] for full layers, and for sliding ones, whose queries at
    `input_pos` [N] see the row of their own and `before` rows before it."""
    rows = torch.arange(mask.shape[3], dtype=torch.int32).view(1, 1, 1, -1)
    outside = rows < input_pos.view(1, 1, -1, 1) - before
    return {"full_attention": mask, "sliding_attention": mask + outside.float() * HIDDEN}


class Base(nn.Module):
    """The target over a fixed cache, from embeddings [1, N, D] to the cache with N rows more, and
    unless it is a prefill to `logits` [1, N, V] and `activations` [1, N, D], which the drafter
    begins with: the hidden states after the final norm."""

    def __init__(self, model: Any, prefill: bool):
        super().__init__()
        self.model, self.prefill = model, prefill

    def forward(
        self, embeddings: Tensor, input_pos: Tensor, mask: Tensor, **others: Tensor
    ) -> dict[str, Tensor]:
        arguments: dict[str, Any] = {}
        states = dict(others)
        if "per_layer_embeddings" in states:
            arguments["per_layer_inputs"] = states.pop("per_layer_embeddings")
        cache: Any = FixedCache(states, input_pos[0])
        window = self.model.config.sliding_window
        hidden = self.model.model(
            inputs_embeds=embeddings, position_ids=input_pos.view(1, -1).long(),
            attention_mask=masks_of(mask, input_pos, window - 1), past_key_values=cache,
            use_cache=True, **arguments,
        ).last_hidden_state  # fmt: skip
        if self.prefill:
            return cache.states
        logits = self.model.lm_head(hidden)
        if (cap := getattr(self.model.config, "final_logit_softcapping", None)) is not None:
            logits = torch.tanh(logits / cap) * cap
        return {"logits": logits, "activations": hidden, **cache.states}


class Embedder(nn.Module):
    """Token ids [1, N] int32 -> scaled embeddings."""

    def __init__(self, embed: Callable[[Tensor], Tensor]):
        super().__init__()
        self.embed = embed

    def forward(self, token_ids: Tensor) -> dict[str, Tensor]:
        return {"embeddings": self.embed(token_ids)}


class PerLayerEmbedder(nn.Module):
    """Token ids [1, N] int32 -> the inputs of each layer [1, N, layers, width]."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, token_ids: Tensor) -> dict[str, Tensor]:
        return {"embeddings": self.model.get_per_layer_inputs(token_ids, None)}


class Drafter(nn.Module):
    """One draft: `activations` [1, 1, 2 D] (scaled embedding, hidden state), `input_pos` [1] of the
    newest row of the cache, the mask and the target's keys and values -> `logits` [1, 1, V] and
    `projected_activations` [1, 1, D], with which the next draft begins.

    Args:
        head: whole.
        sources: layer type -> layer of the target whose keys and values are read.
        int8: hold the table of ordered embeddings as int8, a scale a row.
    """

    members: Tensor
    """[C, M, H] the table, cluster by cluster."""
    scale: Tensor
    """[C, M] of its rows, where they are int8."""
    place: Tensor
    """[V] where each token's row is among them."""

    def __init__(self, head: Any, sources: dict[str, int], int8: bool = False):
        super().__init__()
        self.head, self.sources = head, sources
        embedder = head.masked_embedding
        if embedder is not None:
            order = embedder.token_ordering.long()
            members = head.lm_head.weight.detach()[order]
            if int8:
                scale = members.abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / 127
                members = (members / scale).round().to(torch.int8)
                self.register_buffer("scale", scale.view(embedder.num_centroids, -1))
            members = members.view(embedder.num_centroids, -1, members.shape[1])
            self.register_buffer("members", members)
            self.register_buffer("place", torch.argsort(order).int())

    def forward(
        self, activations: Tensor, input_pos: Tensor, mask: Tensor, **cache: Tensor
    ) -> dict[str, Tensor]:
        head = self.head
        window = head.config.text_config.sliding_window
        shared = {
            kind: (cache[name_of("k", layer)], cache[name_of("v", layer)])
            for kind, layer in self.sources.items()
        }
        state = head.model(
            inputs_embeds=head.pre_projection(activations),
            position_ids=input_pos.view(1, 1).long(),
            # The row of its own is not there: as many as a training row sees.
            attention_mask=masks_of(mask, input_pos, window), shared_kv_states=shared,
            use_cache=False,
        ).last_hidden_state  # fmt: skip
        return {"logits": self._logits(state), "projected_activations": head.post_projection(state)}

    def _logits(self, state: Tensor) -> Tensor:
        """[1, 1, V], of ordered embeddings those of the best clusters and HIDDEN elsewhere."""
        embedder = self.head.masked_embedding
        if embedder is None:
            return self.head.lm_head(state)
        count, size, width = self.members.shape
        best = embedder.centroids(state)[0, 0].topk(embedder.centroid_intermediate_top_k).indices
        found = torch.matmul(self.members[best].view(-1, width).float(), state[0, 0])
        if self.members.dtype == torch.int8:
            found = found * self.scale[best].view(-1)
        by_cluster = torch.full((count, size), HIDDEN).index_put((best,), found.view(-1, size))
        return by_cluster.view(-1)[self.place].view(1, 1, -1)


class Parts:
    """What is made, and the shapes of all of it.

    Args:
        folder: with what `serve/litert.py` wrote.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.settings = json.loads((folder / "export.json").read_text(encoding="utf-8"))
        kind = json.loads((folder / "target" / "config.json").read_text())["model_type"]
        cls: Any = Gemma3ForCausalLM if kind.startswith("gemma3") else Gemma4ForCausalLM
        self.target = self._load(cls, "target")
        self.head = self._load(Gemma4AssistantForCausalLM, "head")
        for config in (self.target.config, self.head.model.config):
            config._attn_implementation = ATTENTION
        # A call writes all of its rows, those that pad it too; where they did not fit, it would
        # write them further ahead, over others.
        verified = self.settings["num_assistant_tokens"] + 1
        longest = max(*self.settings["prefill_lengths"], verified)
        self.rows: int = self.settings["cache_length"] + longest
        self.sources: dict[str, int] = self.settings["source_layers"]
        self.int8: bool = self.settings["dtype"] == "int8"
        self.generator = torch.Generator().manual_seed(0)
        self.states = self._empty_cache()
        """The engine's names of keys and values -> what a text left in them."""
        self.seen = 0
        """Tokens of that text."""
        self.begun = torch.zeros(1, 1, 2 * self.target.config.hidden_size)
        """What the first draft after it begins with."""

    def _load(self, cls: Any, name: str) -> Any:
        model, info = cls.from_pretrained(
            self.folder / name, dtype=torch.float32, output_loading_info=True
        )
        if lost := [*itertools.chain(*map(info.get, ("missing_keys", "unexpected_keys")))]:
            raise ValueError(f"weights of the {name} that do not arrive: {', '.join(lost[:4])}")
        return model.eval()

    def _empty_cache(self) -> dict[str, Tensor]:
        """Keys and values of each layer that has its own."""
        states = {}
        for i, layer in enumerate(self.target.model.layers):
            attention = layer.self_attn
            if not getattr(attention, "is_kv_shared_layer", False):
                width = attention.head_dim
                groups = attention.k_proj.out_features // width
                states[name_of("k", i)] = torch.zeros(1, groups, self.rows, width)
                states[name_of("v", i)] = torch.zeros(1, groups, width, self.rows)
        return states

    def call(self, first: int, count: int) -> dict[str, Tensor]:
        """`input_pos` and `mask` of a call whose rows stand from `first` on."""
        position = torch.arange(first, first + count, dtype=torch.int32)
        seen = torch.arange(self.rows)[None] <= position[:, None]
        mask = torch.where(seen, 0.0, HIDDEN).view(1, 1, count, self.rows)
        return {"input_pos": position, "mask": mask}

    def embedded(self, ids: Tensor) -> dict[str, Tensor]:
        """What the base is given of tokens [1, N]."""
        model = self.target.model
        inputs = {"embeddings": model.embed_tokens(ids).detach()}
        if getattr(self.target.config, "hidden_size_per_layer_input", 0):
            inputs["per_layer_embeddings"] = model.get_per_layer_inputs(ids, None).detach()
        return inputs

    def base_inputs(self, count: int) -> dict[str, Tensor]:
        """Of a call of the base with `count` rows, after the text."""
        return self.embedded(self._ids(count)) | self.call(self.seen, count) | self.states

    def graphs(self) -> dict[str, dict[str, tuple[nn.Module, dict[str, Tensor]]]]:
        """File -> signature -> module and inputs."""
        target, lengths = self.target, self.settings["prefill_lengths"]
        verified = self.settings["num_assistant_tokens"] + 1
        prefill, generate = Base(target, prefill=True), Base(target, prefill=False)
        base = {f"prefill_{n}": (prefill, self.base_inputs(n)) for n in lengths}
        base["decode"] = (generate, self.base_inputs(1))
        base["verify"] = (generate, self.base_inputs(verified))
        found: dict[str, Any] = {"prefill_decode": base}
        embedders: dict[str, tuple[str, nn.Module]] = {
            "embedder": ("embedder", Embedder(target.model.embed_tokens))
        }
        if getattr(target.config, "hidden_size_per_layer_input", 0):
            embedders["per_layer_embedder"] = (
                "per_layer_embedder", PerLayerEmbedder(target.model)
            )  # fmt: skip
        for file, (name, module) in embedders.items():
            sizes = {f"decode_{name}": 1} | {f"prefill_{name}_{n}": n for n in lengths}
            found[file] = {
                signature: (module, {"token_ids": self._ids(count)})
                for signature, count in sizes.items()
            }
        names = [name_of(kind, layer) for layer in self.sources.values() for kind in "kv"]
        inputs = {"activations": self.begun} | self.call(self.seen - 1, 1)
        inputs |= {name: self.states[name] for name in names}
        drafter = Drafter(self.head, self.sources, self.int8)
        found["mtp_drafter"] = {"draft": (drafter, inputs)}
        return found

    def _ids(self, count: int) -> Tensor:
        ids = torch.randint(self.target.config.vocab_size, (1, count), generator=self.generator)
        return ids.int()


def close(found: Tensor, wanted: Tensor, what: str) -> None:
    """Raise `ArithmeticError` where two results differ by more than a share of the largest value;
    of what nobody looks at, nothing is asked."""
    looked_at = wanted > HIDDEN / 2
    difference = float((found - wanted)[looked_at].abs().max())
    scale = float(wanted[looked_at].abs().max())
    if not difference <= TOLERANCE * scale:
        raise ArithmeticError(f"{what} differs by {difference:g} of {scale:g}")
    print(f"{what} differs by {difference:.2g} of {scale:.3g}", flush=True)


@torch.no_grad()
def read_probe(parts: Parts) -> None:
    """Run target and head, as the graphs are made of them, over a text that goes beyond the sliding
    window, and compare them with what Headstart computed of it."""
    probe = load_file(parts.folder / "probe.safetensors")
    ids = probe["ids"].int()
    seen = ids.shape[1] - 1
    call = parts.embedded(ids[:, :-1]) | parts.call(0, seen) | parts.states
    found = Base(parts.target, prefill=False)(**call)
    close(found["activations"], probe["hidden"], "the target")
    parts.states, parts.seen = {name: found[name] for name in parts.states}, seen
    newest = parts.embedded(ids[:, -1:])["embeddings"]
    parts.begun = torch.cat([newest, found["activations"][:, -1:]], dim=-1)
    drafter = Drafter(parts.head, parts.sources)
    draft = drafter(parts.begun, **parts.call(seen - 1, 1), **parts.states)["logits"]
    close(draft[0], probe["logits"], "the head")


def convert(signatures: dict[str, tuple[nn.Module, dict[str, Tensor]]], path: Path) -> None:
    """Write a file of some signatures, and compare what it computes with the modules."""
    converter: Any = litert_torch
    for name, (module, inputs) in signatures.items():
        converter = converter.signature(name, module.eval(), sample_kwargs=inputs)
    converter.convert(strict_export=False).export(str(path))
    interpreter = Interpreter(model_path=str(path))
    for name, (module, inputs) in signatures.items():
        with torch.no_grad():
            wanted = module(**inputs)
        found = interpreter.get_signature_runner(name)(**{k: v.numpy() for k, v in inputs.items()})
        for key, tensor in wanted.items():
            what = f"{key} of {name} in {path.name}"
            close(torch.from_numpy(found[key]), tensor, what)


def quantize(path: Path) -> None:
    """Hold the weights of linear layers and tables in a file as int8, a scale a row, in place; they
    meet activations that are rounded to int8 on the way."""
    from ai_edge_quantizer import quantizer, recipe

    whole = path.with_suffix(".float.tflite")
    path.rename(whole)
    work = quantizer.Quantizer(str(whole))
    work.load_quantization_recipe(recipe.dynamic_wi8_afp32())
    work.quantize().export_model(str(path))
    whole.unlink()


def metadata_of(settings: dict[str, Any], kind: str) -> llm_metadata_pb2.LlmMetadata:
    """What the engine is told beside the graphs."""
    found = llm_metadata_pb2.LlmMetadata(
        max_num_tokens=settings["cache_length"], jinja_prompt_template=settings["chat_template"]
    )
    family = "gemma3" if kind.startswith("gemma3") else "gemma4"
    getattr(found.llm_model_type, family).SetInParent()
    if settings["bos_token_id"] is not None:
        found.start_token.token_ids.ids.append(settings["bos_token_id"])
    for token in settings["stop_ids"]:
        found.stop_tokens.add().token_ids.ids.append(token)
    return found


def pack(parts: Parts, files: dict[str, Path], out: Path) -> None:
    """Put the graphs, the tokenizer and the metadata into one file."""
    metadata = parts.folder / "metadata.pb"
    kind = parts.target.config.model_type
    metadata.write_bytes(metadata_of(parts.settings, kind).SerializeToString())
    builder: Any = litertlm_builder.LitertLmFileBuilder()
    builder.add_llm_metadata(str(metadata))
    builder.add_hf_tokenizer(str(parts.folder / "tokenizer.json"))
    for name, path in files.items():
        kind = litertlm_builder.TfLiteModelType.get_enum_from_tf_free_value(name)
        builder.add_tflite_model(str(path), kind)
    with out.open("wb") as file:
        builder.build(file)


def main() -> None:
    folder, out = map(Path, sys.argv[1:])
    parts = Parts(folder)
    read_probe(parts)
    files = {}
    for name, signatures in parts.graphs().items():
        files[name] = folder / f"{name}.tflite"
        convert(signatures, files[name])
        if parts.int8:
            quantize(files[name])
    pack(parts, files, out)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        print(error, file=sys.stderr)
        sys.exit(NO_ROOM)
