"""What a process holds in a GPU's memory at the fullest moment of each phase of a run, and what the
machine holds beside it: arithmetic over configurations, without weights.

Every term was compared with the storages that the program's own functions keep alive over tensors
of these shapes without data (tests/helpers/fake_memory.py; docs/how-to/many-gpus.md has both side
by side). Left out are the CUDA context (about half a GiB), what an allocator loses to fragments,
and what a collective library keeps.

Letters: B batch, T positions, D width, I MLP width, H query heads, G key heads, V vocabulary, L
layers, N drafts of a batch, P parameters that are trained, C candidates.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from headstart.configs.schema import Config, DataConfig, TrainConfig
from headstart.data.background import THREADS
from headstart.data.extraction import BATCH_TOKENS, LOGIT_ROWS
from headstart.data.kv_cache import SLACK
from headstart.data.loader import pack
from headstart.heads.kernels import copied_keys, groups_heads
from headstart.heads.kinds import inputs_of, kind_of
from headstart.heads.target import KEYS_AND_VALUES, SUPPORTED, Inputs, source_layers
from headstart.train.losses import EXACT_ROWS, SPARSE_ROWS

BATCHES = THREADS + 2  # that of the step, one for each thread of the loader, and one in waiting
MOMENTS = 8  # bytes of a trained parameter: two moments of AdamW in float32
CANDIDATES_A_DRAFT = 4
"""Tokens that a draft's teacher adds to the candidates of a step. In the real store of the
quickstart it was 4.7 of 32 with 160 drafts a step, 3.5 with 1,280 and 2.2 with 5,120."""


@dataclass(frozen=True)
class Launch:
    """How many processes share the work, one a GPU, and how they share the head."""

    processes: int = 1
    fsdp: bool = False
    """FSDP2; else DDP, where there are several."""


@dataclass(frozen=True)
class TargetSize:
    """Parameters of a target."""

    layers: int
    """In all decoder layers."""
    rest: int
    """Embeddings, norms, and all else."""
    largest_layer: int


def target_size(config: Any) -> TargetSize:
    """The parameters of a target, counted over its modules on the meta device.

    Args:
        config: the whole configuration, of a class in `SUPPORTED`.
    """
    with torch.device("meta"):
        model = SUPPORTED[config.model_type](config)
    layers: dict[str, int] = {}
    rest = 0
    for name, parameter in model.named_parameters():
        before, found, after = name.partition(".layers.")
        if found:
            layer = f"{before}.{after.partition('.')[0]}"
            layers[layer] = layers.get(layer, 0) + parameter.numel()
        else:
            rest += parameter.numel()
    return TargetSize(sum(layers.values()), rest, max(layers.values()))


def held_target(size: TargetSize, width: int, launch: Launch, sharded: bool) -> int:
    """Bytes of a target of `width` bytes a value on each GPU.

    A split one has, beside its share, one layer whole: once as it came over the network, once as
    its parameters.
    """
    if not sharded or launch.processes == 1:
        return (size.layers + size.rest) * width
    return (size.layers // launch.processes + size.rest + 2 * size.largest_layer) * width


def kv_bytes(text: Any, layer: int, width: int) -> int:
    """Of the keys and values of a token in one layer; 0 where it shares those of another."""
    if layer >= text.num_hidden_layers - getattr(text, "num_kv_shared_layers", 0):
        return 0
    own = text.per_layer_config[layer]
    return int(2 * own.num_key_value_heads * own.head_dim * width)


def forward_bytes(
    text: Any, batch: int, length: int, width: int, cached: Sequence[int] | None
) -> int:
    """What a target's forward over [B, T] padded tokens holds at its fullest moment, beside the
    weights; all of it is in proportion to the tokens, but for the masks.

    Held all through it: the embeddings, the inputs per layer, sines and cosines of both layer
    types, two masks of a byte an entry, and with `cached` the keys and values so far. The fullest
    moment is the largest of these, whose first terms are the hidden states that the frames of model
    and layer still name:
    - the norm of the inputs per layer, in float32, twice;
    - the norm of the queries, likewise;
    - attention: queries, result, and where heads share keys a copy of them for each; the mask as a
      bias of the queries' dtype. Where heads are grouped (`groups_heads`), in place of the copies:
      queries and result in the order of groups, the result turned back, a mask for each head;
    - the MLP: gate, up, and their product;
    - the experts: as many rows as a token has experts, of input, of output, and twice of output
      times its weight in float32.

    Args:
        text: the text configuration.
        width: bytes of a value.
        cached: for how many tokens of each text the cache of each layer has room; None: there is
            no cache.
    """
    d, tokens, layers = text.hidden_size, batch * length, text.num_hidden_layers
    norm = width + 4 * (width < 4) + 4  # its input, that in float32, and the square
    inputs = layers * (getattr(text, "hidden_size_per_layer_input", 0) or 0)
    heads = [text.per_layer_config[i].head_dim for i in source_layers(text).values()]
    standing = d * width + inputs * width + 2 * sum(heads) * width + 2 * length
    moments = [inputs * norm + d * width]
    before = 0
    for i in range(layers):
        own, kv = text.per_layer_config[i], kv_bytes(text, i, width)
        kv = kv * cached[i] // length if cached else kv
        queries = text.num_attention_heads * own.head_dim
        attention = queries * width * (2 + 2 * copied_keys(text, own)) + length * width
        groups = own.num_key_value_heads
        if copied_keys(text, own) and groups_heads(length, groups, own.head_dim):
            attention = queries * width * 5 + text.num_attention_heads // groups * length
        wide = getattr(text, "use_double_wide_mlp", False) and not kv
        mlp = text.intermediate_size * (2 if wide else 1)
        in_layer = [
            2 * d * width + queries * norm,
            2 * d * width + attention + kv,
            3 * d * width + 3 * mlp * width + kv,
        ]
        if getattr(text, "enable_moe_block", False):
            in_layer.append(5 * d * width + text.top_k_experts * d * (2 * width + 8) + kv)
        moments.append(before + max(in_layer))
        before += kv if cached else 0
    return int(tokens * (standing + max(moments)))


def cached_rows(text: Any, rows: int, slack: int = 0) -> list[int]:
    """For how many of the rows of a text the cache of each layer has room: of sliding layers the
    window and `slack` rows alone."""
    most = (text.sliding_window or 0) + slack  # None: no layer slides
    return [min(rows, most) if t == "sliding_attention" else rows for t in text.layer_types]


def generation_bytes(
    text: Any,
    d: DataConfig,
    width: int,
    recorded: bool,
    inputs: Inputs = KEYS_AND_VALUES,
) -> int:
    """What answering a batch of the longest prompts holds beside the weights: the larger of the
    prefill and the end.

    Its cache is there whole from the prefill on: of sliding layers a window and some rows more,
    but with `recorded` all rows of the one that a head attends to, if it does (`inputs`). Recorded
    are the hidden states of all tokens too, and outputs of layers that it reads. At the end they
    are held with the cache, and with the larger of: the logits of a step (of the target, and twice
    in float32 while they are drawn from); all these states once more, as one tensor each.
    """
    batch, rows = d.generation_batch_size, d.max_prompt_tokens + d.max_new_tokens - 1
    room = cached_rows(text, rows, SLACK)
    if recorded and inputs.kv:
        room[source_layers(text)["sliding_attention"]] = rows
    cache = batch * sum(kv_bytes(text, i, width) * n for i, n in enumerate(room))
    hidden = batch * rows * text.hidden_size * width * recorded * (1 + len(inputs.layers))
    last = cache + hidden + max((width + 8) * batch * text.vocab_size, hidden)
    return max(forward_bytes(text, batch, d.max_prompt_tokens, width, room), last)


def forward_length(d: DataConfig) -> tuple[int, int]:
    """Texts of a forward of the extraction, and tokens of each, where they are longest."""
    longest = longest_text(d)
    return max(1, BATCH_TOKENS // longest), longest


def longest_text(d: DataConfig) -> int:
    """Tokens of the longest conversation, or piece of one."""
    if d.conversations is None and d.store is None:
        return min(d.max_tokens, d.max_prompt_tokens + d.max_new_tokens)
    return d.max_tokens


def extraction_bytes(text: Any, d: DataConfig, width: int, inputs: Inputs = KEYS_AND_VALUES) -> int:
    """What one forward of `headstart extract` holds beside the weights, or what a head sees of it
    with the hidden states once more and the logits of some rows, three of them while they are
    capped."""
    batch, length = forward_length(d)
    outputs = batch * length * text.hidden_size * width * len(inputs.layers)
    forward = forward_bytes(text, batch, length, width, cached=None) + outputs
    kv = sum(kv_bytes(text, i, width) for i in source_layers(text).values())
    seen = batch * length * (2 * text.hidden_size * width + kv) + outputs
    return max(forward, seen + LOGIT_ROWS * text.vocab_size * 3 * width)


@dataclass(frozen=True)
class StepShape:
    """The batch of a step at its largest: conversations of the greatest length."""

    batch: int
    """B rows of keys and values."""
    length: int
    """T."""
    rounds: list[int]
    """Drafts of each round, in all B rows."""

    @property
    def drafts(self) -> int:
        return sum(self.rounds)


def step_shape(c: TrainConfig, d: DataConfig) -> StepShape:
    """The largest batch that the configuration allows."""
    longest = longest_text(d)
    packs = pack([longest] * c.batch_size, c.max_packed_length or longest)
    batch, members = len(packs), max(map(len, packs))
    later = c.multi_step_anchors or c.max_anchors
    each = [c.max_anchors] + [later] * (c.num_speculative_steps - 1)
    return StepShape(batch, members * longest, [batch * members * anchors for anchors in each])


def batch_bytes(source: Any, shape: StepShape, width: int, data: DataConfig, inputs: Inputs) -> int:
    """Of the batches that are there at once: those made ahead, and that of the step, of which int8
    is held twice, as it is stored and as the head reads it; `inputs` is what it reads."""
    kv = [source.per_layer_config[i] for i in source_layers(source).values()] * inputs.kv
    # Hidden states of anchors and of what teaches them alone: at most one each of a draft.
    read = min(shape.length, (shape.rounds[0] + shape.drafts) // shape.batch)
    read = shape.length if inputs.whole_texts else read
    rows = [(read, 1 + len(inputs.layers), source.hidden_size)]
    rows += [(shape.length, 2 * layer.num_key_value_heads, layer.head_dim) for layer in kv]
    int8 = data.storage == "int8"
    stored = sum(t * n * (d + 4 if int8 else d * width) for t, n, d in rows) * shape.batch
    computed = sum(t * n * d * width for t, n, d in rows) * shape.batch if int8 else 0
    # Also of the anchors that do not go on; ids are int64.
    teachers = max(shape.rounds) * len(shape.rounds) * data.teacher_top_k * (8 + 4)
    return int(BATCHES * (stored + teachers) + computed)


def activation_bytes(head: Any, shape: StepShape, compute: int, checkpointing: bool) -> int:
    """What the head's forward keeps for its backward pass.

    With `checkpointing` the inputs of the layers, and one layer at a time, which there runs on
    transformers' own attention: where heads share keys, with a copy of keys and values for each
    head.

    Args:
        head: its configuration.
        compute: bytes of a value that products are computed in.
    """
    width = head.get_text_config().hidden_size
    one = kind_of(head).draft_memory(head, compute)
    total, cells = 0, shape.batch * shape.length
    whole = inputs_of(head).whole_texts  # it makes the first draft everywhere
    for drafts in [cells, *shape.rounds[1:]] if whole else shape.rounds:
        pairs = zip(one.layers, one.copied_keys, strict=True)
        layers = [drafts * each + cells * checkpointing * copied for each, copied in pairs]
        kept = drafts * one.beside + cells * one.kept_keys
        if checkpointing:
            kept += drafts * width * compute * len(layers) + max(layers) // len(shape.rounds)
        else:
            kept += sum(layers)
        total += kept
    return int(total)


def candidate_count(source: Any, c: TrainConfig, shape: StepShape) -> int:
    """C: the tokens that the sparse objective runs over in a step."""
    drawn = c.likely_tokens + c.negatives + CANDIDATES_A_DRAFT * shape.drafts
    return int(min(source.vocab_size, drawn))


def objective_bytes(source: Any, c: TrainConfig, shape: StepShape, compute: int, width: int) -> int:
    """What the losses hold: the candidates' rows of the table, the teacher's logits of them, and
    those of the drafts that are looked at together, in seven tensors of float32."""
    if c.vocabulary == "exact":
        return int(EXACT_ROWS * source.vocab_size * 7 * 4)
    candidates = candidate_count(source, c, shape)
    rows = candidates * source.hidden_size * (width + (compute if compute != width else 0))
    said = shape.drafts * candidates * (4 + width)
    states = 2 * shape.drafts * source.hidden_size * 4
    return int(rows + said + states + SPARSE_ROWS * candidates * 7 * 4)


@dataclass(frozen=True)
class HeadSize:
    """Parameters of a head in training."""

    trained: int
    frozen: int = 0
    """Without its table."""
    table: int = 0
    """In a table of its own, V x H; 0 where it shares the target's."""


def head_step_bytes(
    config: Config, source: Any, head: Any, size: HeadSize, launch: Launch, width: int
) -> int:
    """What training holds beside the target, at the fullest of three moments.

    Held all through it: batches, and of each trained parameter 4 bytes of weight, 8 of moments
    and, with `train.ema_decay`, 4 of average; DDP has buckets for gradients, 4 more. Moments:
    - the losses: weights as autocast copies them, all activations, candidates;
    - the first gradients: those copies, a gradient of each in the same dtype, all activations;
    - the optimizer, which is one kernel: a gradient of 4 bytes.

    FSDP2 divides all of it by the processes, but for weights and gradients as they are gathered,
    of two values each in the dtype that is computed in (weights and what they came in, or gradients
    and what they leave in).
    """
    c, shape = config.train, step_shape(config.train, config.data)
    compute = 2 if c.mixed_precision == "bf16" else 4
    all_parameters = size.trained + size.frozen
    copies = compute * all_parameters * (compute == 2)
    gradients = compute * size.trained
    held = (4 + MOMENTS + 4 * (c.ema_decay is not None)) * size.trained
    held += 4 * (size.frozen + size.table)
    kept, optimizer = 0, 4 * size.trained
    if launch.fsdp and launch.processes > 1:
        held, optimizer = held // launch.processes, optimizer // launch.processes
        copies = gradients = compute * all_parameters
        kept = 4 * size.trained // launch.processes
    elif launch.processes > 1:
        held += 4 * size.trained
    batch = batch_bytes(source, shape, width, config.data, inputs_of(head))
    activations = activation_bytes(head, shape, compute, c.activation_checkpointing)
    losses = copies + activations + objective_bytes(source, c, shape, compute, width)
    backward = copies + gradients + kept + activations
    return int(held + batch + max(losses, backward, optimizer))


def checkpoint_bytes(config: Config, size: HeadSize, launch: Launch) -> int:
    """What a checkpoint holds beside the target: weights and moments, and under FSDP2 all of them
    whole on every GPU, beside its share."""
    each = 4 + MOMENTS + 4 * (config.train.ema_decay is not None)
    whole = each * size.trained
    share = whole // launch.processes if launch.fsdp and launch.processes > 1 else 0
    return whole + share + 4 * (size.frozen + size.table)


def check_bytes(config: Config, source: Any, size: TargetSize, head: HeadSize, table: int) -> int:
    """What the float32 check at the end of a run holds, on the first GPU alone: target and head,
    that with a table of its own, and a text of the longest prompt with its answer.

    Args:
        table: values of the head's table, V x H.
    """
    assert config.eval is not None
    prompt, new = config.data.max_prompt_tokens, config.eval.max_new_tokens
    weights = 4 * (size.layers + size.rest + head.trained + head.frozen + table)
    prefill = forward_bytes(source, 1, prompt, 4, cached=[prompt] * source.num_hidden_layers)
    rows = cached_rows(source, prompt + new)
    return int(weights + max(prefill, sum(kv_bytes(source, i, 4) * n for i, n in enumerate(rows))))


def needs_check(config: Config, width: int) -> bool:
    """Whether the run ends with a check in float32, beside the evaluation in the target's dtype."""
    return config.eval is not None and bool(config.eval.fp32_check_prompts) and width < 4


CHECK = "the float32 check"
"""The phase that is left out where it does not fit."""


def needed(found: dict[str, int]) -> int:
    """What of `peaks` a GPU has to have."""
    return max(count for phase, count in found.items() if phase != CHECK)


@dataclass(frozen=True)
class RunShapes:
    """What the memory of a run depends on, beside its settings."""

    text: Any
    """The target's text configuration."""
    target: TargetSize
    head: Any
    """The head's configuration."""
    size: HeadSize


def peaks(config: Config, shapes: RunShapes, launch: Launch) -> Iterator[tuple[str, int]]:
    """Name of each phase of a run that touches a GPU, and the bytes that it holds at its fullest on
    each, the target's weights included."""
    d, text, size = config.data, shapes.text, shapes.size
    width = 2 if config.target.dtype == "bfloat16" else 4
    target = held_target(shapes.target, width, launch, config.target.sharded)
    inputs = inputs_of(shapes.head)
    extracting = extraction_bytes(text, d, width, inputs)
    # Whole, also where it is split then.
    yield "loading", held_target(shapes.target, width, launch, sharded=False)
    if d.store is None:
        if d.conversations is None:
            generating = generation_bytes(text, d, width, not d.online, inputs)
            yield "answering", target + generating
        if d.conversations is not None:
            yield "extracting", target + extracting
    step = head_step_bytes(config, text, shapes.head, size, launch, width)
    yield "training", target + step + extracting * d.online
    yield "a checkpoint", target + checkpoint_bytes(config, size, launch)
    if needs_check(config, width):
        of_head = shapes.head.get_text_config()
        table = of_head.vocab_size * of_head.hidden_size
        yield CHECK, check_bytes(config, text, shapes.target, size, table)
