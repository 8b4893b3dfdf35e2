"""The typed run configuration: one frozen, strict tree, saved resolved with every run.

Every field has a default and a docstring with its unit. A combination that cannot work raises
when the configuration is loaded, not an hour into the run.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from headstart.configs.section import BUILTIN, Folder, Place, Section

Quantization = Literal["torchao-int8", "bnb-int8", "bnb-nf4"]
"""Ways to hold the weights of a target's layers in fewer bits (heads/adapters.py)."""


class TargetConfig(Section):
    name: Place = "gemma3-270m"
    """Built-in name (`gemma3-270m`, `tiny-gemma4`, `tiny-gemma3`), local folder, Hub id, or a GGUF
    file, whose weights are taken out of their quantization."""
    revision: str | None = None
    """Hub revision (branch, tag or commit). None: the default branch."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype in which the target generates and in which its activations are stored. `auto`:
    bfloat16 on GPUs and on CPUs with instructions for it (avx512_bf16, AMX), else float32."""
    trust_remote_code: bool = False
    """Whether code shipped with a Hub checkpoint may run. Off unless you turn it on."""
    adapters: list[Place] = []
    """PEFT adapters on top of it, one after another: folders or Hub ids, `ID@REVISION` for a
    revision."""
    merge_adapters: bool = True
    """Whether the adapters' weights are added to the target's own. False: they stay beside them, as
    in a server that swaps adapters; the roundings then differ, and each forward costs more."""
    quantization: Quantization | None = None
    """How it will be served, so that the head learns from what it then says: `torchao-int8` (the
    weights of the layers as int8, anywhere), `bnb-int8` or `bnb-nf4` (bitsandbytes, with adapters
    beside it)."""
    chat_template: Folder | None = None
    """File of a chat template (Jinja) in place of the tokenizer's. None: its own, where it has
    one; chat turns are otherwise joined by newlines."""
    eos_token_ids: list[NonNegativeInt] | None = None
    """Tokens that end a text. None: those of the checkpoint's generation_config.json, and the one
    with which the chat template ends an assistant's turn."""
    sharded: bool = False
    """Several processes: each keeps a share of each layer's weights (FSDP2) in place of all of
    them. For targets that fill a GPU: every forward then gathers the layers over the network."""

    @model_validator(mode="after")
    def _check(self) -> "TargetConfig":
        bits = self.quantization is not None
        if bits and self.quantization != "torchao-int8" and self.adapters and self.merge_adapters:
            raise ValueError(
                f"{self.quantization} weights cannot take adapters in: set merge_adapters=false"
            )
        if bits and self.sharded:
            raise ValueError("a quantized target is not split: leave out sharded or quantization")
        return self


class LoraConfig(Section):
    """Training of a few numbers beside a finished head's own (arXiv 2106.09685), through peft."""

    r: PositiveInt = 8
    """Rank of what is added to each weight."""
    lora_alpha: float | None = Field(default=None, gt=0)
    """Its scale is lora_alpha / r. None: twice the rank."""
    target_modules: list[str] = [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "entry",
        "pre_projection", "post_projection",
    ]  # fmt: skip
    """Names of the linear layers that get some; all of the head's by default."""


class HeadConfig(Section):
    kind: str = "assistant"
    """Kind of head (`headstart heads kinds` lists them). That of a finished head in `init_from` is
    its own."""
    num_hidden_layers: PositiveInt | None = None
    """Depth. Of an assistant decoder layers, of which the last attends as `full_attention` and the
    others as `sliding` (None: 2); of `parallel` residual blocks for each draft (None: 1); `mtp`
    and `eagle` are one layer."""
    hidden_size: PositiveInt | None = None
    """Width. None: the target's width, which ties the table as it is; narrower: low-rank tie."""
    intermediate_size: PositiveInt | None = None
    """MLP width. None: that of the target's source layer for a full-width head, and 4 x width for a
    narrower one; of `parallel` the head's width."""
    num_attention_heads: PositiveInt | None = None
    """Query heads, of a kind that has some. None: the target's number."""
    init_from: Place = "target"
    """Weights at step 0: `target`, its own source layers (full width only); `random`; or a finished
    head, by folder or Hub id, such as google/gemma-4-E4B-it-assistant, whose shapes are kept."""
    lora: LoraConfig | None = None
    """Train a low-rank adapter of the head in `init_from` in place of its weights. It is saved
    beside the head that it makes, `head/adapter/`: some hundred kilobytes that `headstart eval
    HEAD+ADAPTER` reads. `lora: {}` takes the defaults."""
    trainable_modules: list[str] = []
    """Parts of the head that are trained, by a piece of their names, such as `pre_projection` or
    `layers.1.`; the rest stays as it starts. None named: all."""
    on_existing_clusters: Literal["keep", "refine", "rebuild"] | None = None
    """What becomes of the clusters of the head in `init_from`: they stay as they are, their
    centroids learn on, or the vocabulary is clustered anew. None: they learn on; with
    `lora` they stay, so that its adapter is all that differs."""
    use_ordered_embeddings: bool = False
    """Draft through a clustered LM head, in transformers' own format: a draft then reads some
    thousand rows of the table in place of all."""
    num_centroids: PositiveInt | None = None
    """Clusters, equal in size. None: 128 tokens in each, as in Google's heads for E2B and E4B."""
    centroid_intermediate_top_k: PositiveInt | None = None
    """Clusters whose tokens a draft is chosen from. None: as many as the finished head in
    `init_from` reads, or 32."""
    centroid_steps: NonNegativeInt = 500
    """Steps, of 256 drafts each, in which the centroids learn when the head is trained. 0: new
    clusters keep the means of their tokens, earlier ones the centroids that they had."""

    @property
    def clusters_read(self) -> int:
        """By a draft of a head that gets its first clusters."""
        return self.centroid_intermediate_top_k or 32

    @property
    def warm(self) -> bool:
        """Whether training goes on from a finished head."""
        return self.init_from not in ("target", "random")

    @model_validator(mode="after")
    def _check(self) -> "HeadConfig":
        shapes = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
        if self.warm and (given := [key for key in shapes if getattr(self, key) is not None]):
            raise ValueError(f"{given[0]} is that of the head in init_from: leave it out")
        if self.warm and self.kind != "assistant":
            raise ValueError("kind is that of the head in init_from: leave it out")
        if self.on_existing_clusters is not None and not self.warm:
            raise ValueError(
                "on_existing_clusters are those of a finished head: name it in init_from"
            )
        if self.on_existing_clusters in ("keep", "refine") and self.num_centroids is not None:
            raise ValueError(
                f"num_centroids makes other clusters: {self.on_existing_clusters} has none"
            )
        if self.lora is not None and not self.warm:
            raise ValueError("lora is beside a finished head: name it in init_from")
        if self.lora is not None and self.trainable_modules:
            raise ValueError(
                "lora trains layers by lora.target_modules: leave out trainable_modules"
            )
        if self.num_centroids is not None and not self.use_ordered_embeddings:
            raise ValueError("num_centroids needs use_ordered_embeddings=true")
        if self.num_centroids is not None and self.num_centroids < self.clusters_read:
            raise ValueError(
                f"centroid_intermediate_top_k={self.clusters_read} is above "
                f"num_centroids={self.num_centroids}"
            )
        return self


class SourceConfig(Section):
    """Where prompts, or whole conversations, come from. A bare string in YAML is its `path`."""

    path: Place
    """A local file (JSONL, Parquet, Arrow, CSV or plain text), a folder or glob of such files, the
    id of a Hugging Face dataset, or `builtin:NAME` of prompts that come with Headstart:
    `chat_train`, `chat_eval`, `text_train`, `passages_train`, `text_eval`, `structured`, or a
    pattern such as `*_eval`."""
    name: str | None = None
    """Configuration of a Hub dataset that has several."""
    split: str = "train"
    """Split of a Hub dataset, slices such as `train[:1000]` included."""
    revision: str | None = None
    """Hub revision (branch, tag or commit). None: the default branch."""
    streaming: bool = False
    """Read a Hub dataset over the network row by row; nothing is downloaded whole."""
    columns: dict[str, str] = {}
    """Our names -> the source's, where it is not recognized: `messages`, `prompt`, `response`,
    `text`, `id`, `category`, `source`, `tools`, `raw`."""
    weight: float | None = Field(default=None, gt=0)
    """Share of the conversations, relative to the other sources. None for all: by size."""
    limit: PositiveInt | None = None
    """Usable rows read at most, from the first on."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: object) -> object:
        return {"path": str(value)} if isinstance(value, str | Path) else value


class FilterConfig(Section):
    """Which documents of a store, or of conversations that are there, are trained on."""

    temperatures: list[float] | None = None
    """Those written at these temperatures alone. None: all."""
    categories: list[str] | None = None
    """Those of these categories of prompts alone. None: all."""
    num_conversations: PositiveInt | None = None
    """So many of what is left, drawn by the seed. None: all."""


class DataConfig(Section):
    prompts: list[SourceConfig] = [SourceConfig(path="builtin:text_train")]
    """Sources of training prompts, one or a list; the target writes the responses."""
    conversations: Folder | None = None
    """Folder of `headstart regenerate`: its conversations are trained on, none are generated.
    `builtin:NAME`: those that come with Headstart, where this target has written them and the
    settings here ask for the same; elsewhere it answers the prompts itself, and a line says so."""
    store: Folder | None = None
    """Folder of `headstart extract`, whose activations are trained on; the target runs over no
    text. It goes before conversations of Headstart's own."""
    online: bool = False
    """True: the target runs inside the training step and no activations are stored."""
    num_conversations: PositiveInt | None = None
    """Training conversations, dealt over the prompts, which repeat when exhausted. None: every
    prompt once."""
    validation_conversations: PositiveInt = 32
    """Held-out conversations, greedy, from sources that no training conversation shares."""
    max_bad_rows: float = Field(default=0.01, ge=0, lt=1)
    """Share of a source's rows that may be unusable; they are skipped and counted. More of them
    stop the run."""
    chat_template_kwargs: dict[str, Any] = {}
    """Passed to the target's chat template, such as `enable_thinking: true`."""
    max_prompt_tokens: PositiveInt = 1024
    """Longer prompts keep their last tokens (unit: tokens)."""
    max_new_tokens: PositiveInt = 128
    """Length at which a response is cut (unit: tokens)."""
    temperatures: list[float | Literal["model"]] = [0.0, 0.7]
    """Sampling temperatures, dealt round robin over conversations. 0 is greedy; `model` is the
    target's own setting: temperature, top-k and top-p of its generation configuration."""
    completion_only_loss: bool = True
    """Train on what the target wrote alone. False: on the prompts too, of whose every token the
    target has a distribution: more rows from the same texts, where the prompts are of the kind that
    the answers are. Conversations are not cut then: `max_tokens` has to hold them."""
    filter: FilterConfig = FilterConfig()
    """Which of a store or of conversations that are there are trained on."""
    generation_batch_size: PositiveInt = 64
    """Conversations generated at once."""
    teacher_top_k: PositiveInt = 32
    """Teacher logits kept a token; the rest of the distribution is kept as one tail mass."""
    storage: Literal["target", "int8"] = "target"
    """How hidden states, keys and values are stored: in the target's dtype, or as int8 with a
    scale a row, about half the size of bfloat16 (docs/results.md says what it costs)."""
    max_tokens: int = Field(default=4096, ge=8)
    """Longer conversations are cut into pieces that overlap by half, so that every token keeps
    context before it (unit: tokens)."""
    cache_dir: Folder | None = None
    """Where conversations and activations are kept. None: the user's cache folder."""

    @property
    def shipped(self) -> bool:
        """Whether the conversations are some that come with Headstart."""
        return str(self.conversations).startswith(BUILTIN)

    @property
    def chooses(self) -> bool:
        """Whether a part of what is there is trained on."""
        return self.filter != FilterConfig()

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if not self.prompts:
            raise ValueError("prompts is empty: name at least one source")
        if 0 < sum(source.weight is None for source in self.prompts) < len(self.prompts):
            raise ValueError("prompts: give every source a weight, or none of them")
        if self.conversations is not None and self.store is not None and not self.shipped:
            raise ValueError("name data.conversations or data.store, not both")
        stored = self.conversations is not None or self.store is not None
        if not stored and self.chooses:
            raise ValueError("filter chooses from data.store or data.conversations: name one")
        if self.online and (self.store is not None or self.storage != "target"):
            raise ValueError("data.online stores nothing: leave out data.store and data.storage")
        if not self.temperatures or any(t != "model" and t < 0 for t in self.temperatures):
            raise ValueError("temperatures needs one value or more: 0 (greedy), above, or model")
        return self


Unroll = Literal["teacher_forced", "reached"]
"""Ways to go beyond the first round (`TrainConfig.unroll`)."""


DraftPositionOffset = Literal[0, -1, "mixed"]
"""Where the drafts of a round stand (`TrainConfig.draft_position_offset`)."""


class TrainConfig(Section):
    max_steps: PositiveInt = 600
    """Optimizer steps."""
    num_epochs: float | None = Field(default=None, gt=0)
    """Passes over the training conversations, in place of max_steps. None: max_steps decides."""
    batch_size: PositiveInt = 8
    """Conversations a step and process, before gradient accumulation."""
    max_packed_length: PositiveInt | None = None
    """Conversations share rows of so many tokens, which saves padding where lengths differ. None:
    a row each."""
    gradient_accumulation_steps: PositiveInt = 1
    """Batches whose gradients are summed before one optimizer step. A step over twice as many
    batches of half the size, or in twice as many processes, is the same step."""
    max_anchors: PositiveInt = 64
    """Rows trained of each conversation in a batch, drawn anew each time (unit: tokens)."""
    multi_step_anchors: PositiveInt | None = None
    """How many of them go on beyond the first round, whose drafts weigh most and cost the same; the
    later rounds then weigh as much less in all. None: all."""
    num_speculative_steps: int = Field(default=4, ge=2)
    """Unroll K: drafts trained from each row. At least 2: from the second on a draft reads the
    head's own hidden state, and one alone would leave `post_projection` untrained."""
    step_loss_decay: float = Field(default=0.8, gt=0, le=1)
    """Weight of round k is step_loss_decay ** (k - 1)."""
    unroll: Unroll = "teacher_forced"
    """Which drafts count beyond the first round, where the head reads the text's tokens.
    `teacher_forced`: all; `reached`: only those before which all of their round are the text's
    tokens, as a decoder would have it. The loss is divided by the weight of all drafts, whichever
    count."""
    draft_position_offset: DraftPositionOffset = "mixed"
    """RoPE position of the drafts of a round, from that of the newest token on; engines differ in
    it. 0: as in transformers and llama.cpp; -1: as in vLLM, SGLang and MLX; `mixed`: every second
    row of a text either way, which loses nothing at either (docs/results.md)."""
    objective: Literal["forward_kl", "cross_entropy", "lk_hybrid"] = "forward_kl"
    """Loss of a draft. `cross_entropy` looks at the target's best token alone; `lk_hybrid` turns
    from KL to total variation as a row comes to be accepted (arXiv 2602.23881)."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of both distributions that the objective compares."""
    vocabulary: Literal["sparse", "exact"] = "sparse"
    """Tokens that the objective runs over: the teachers' top tokens and shared negatives, or the
    whole vocabulary in chunks (the reference; many times slower)."""
    likely_tokens: NonNegativeInt = 4096
    """The tokens that the target finds likeliest in the training text: always among those that the
    sparse objective runs over, beside the teachers' top tokens."""
    negatives: PositiveInt = 4096
    """Tokens drawn at random as shared negatives, which stand for all others."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate of AdamW."""
    warmup_steps: NonNegativeInt = 30
    """Steps of linear warm-up; a cosine to a tenth of the peak follows."""
    max_minutes: float | None = Field(default=None, gt=0)
    """Training ends after so much time, if `max_steps` are not done before; the learning rate falls
    with the time then, so that what a run comes to depends on the machine. None: no limit."""
    early_stopping_patience: PositiveInt | None = None
    """Training ends after so many validations in a row without a better head. None: never."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW weight decay, on matrices alone."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """Weights of the head are float32; `bf16` computes in bfloat16 (autocast), `no` in float32 too.
    `auto`: as `target.dtype` would be."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay a step of an exponential moving average of the weights, which is then what is validated
    and saved as the head. None: the weights themselves."""
    activation_checkpointing: bool = False
    """Compute the activations of the head's layers again in the backward pass in place of keeping
    them: less memory, about a third more time."""
    compile: bool = False
    """Compile the head's layers with `torch.compile`: minutes at the start, then faster steps on a
    GPU."""
    deterministic: bool = False
    """Train with algorithms that give the same bits each time, on a GPU too, where some are slower.
    An operation that has none there stops the run and is named. Answers are not written so."""
    eval_steps: PositiveInt = 125
    """Steps between validations; each may make a new best head."""
    save_steps: PositiveInt = 150
    """Steps between checkpoints; a validation that finds a better head makes one too."""
    save_total_limit: PositiveInt = 2
    """Newest checkpoints kept. The best head stays beside them, in the run's `head/`."""

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.num_epochs is None and self.warmup_steps >= self.max_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} must be below max_steps={self.max_steps}"
            )
        if self.multi_step_anchors is not None and self.multi_step_anchors > self.max_anchors:
            raise ValueError(
                f"multi_step_anchors={self.multi_step_anchors} is above "
                f"max_anchors={self.max_anchors}"
            )
        return self


Engine = Literal["transformers", "vllm", "llama.cpp", "mlx", "litert"]
"""What serves a head (serve/engines.py)."""


Decoder = Literal[
    "transformers", "exact", "unconstrained", "heuristic", "cost", "hybrid", "lookup", "draft-model"
]
"""Ways to decode with drafts (docs/how-to/evaluate-and-compare.md): of the head through the stock
candidate generator; of the head through the exact decoder, K a round, the same without regard to
a prompt's JSON schema, two more or one less after each round, as many as the cost rule says, the
same with lookups in the text; prompt lookup alone, which needs no head; a small model of the same
vocabulary through the stock generator."""


class EvalConfig(Section):
    prompts: Place = "builtin:text_eval"
    """Held-out prompts: a file, a Hub dataset, or a set by its name, such as `builtin:text_eval`
    or `spec-bench` (docs/how-to/evaluate-and-compare.md)."""
    num_assistant_tokens: list[PositiveInt] = [2, 4]
    """Draft lengths K to measure."""
    decoders: list[Decoder] = ["transformers", "exact"]
    """Ways to decode with drafts, compared with plain decoding
    (docs/how-to/evaluate-and-compare.md). `heuristic`, `cost` and `hybrid` choose K themselves, up
    to 8."""
    draft_models: list[Place] = []
    """Small models of the target's vocabulary (folder or Hub id) for the decoder `draft-model`."""
    temperatures: list[float | Literal["model"]] = [0.0]
    """0 (greedy), above, or `model`: temperature, top-k and top-p of the target's own generation
    configuration. Each is compared with plain decoding of its own."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Above temperature 0: mass of the tokens to sample from."""
    top_k: PositiveInt | None = None
    """Above temperature 0: sample from so many likeliest tokens. None: from all."""
    seeds: list[NonNegativeInt] = [0, 1]
    """Seeds of the sampling. Each prompt is sampled once with each, and a result is over all of
    them."""
    max_new_tokens: PositiveInt = 64
    """Tokens generated a prompt, or a turn of it."""
    limit: PositiveInt | None = None
    """Prompts measured, dealt evenly over the categories. None: all of them."""
    concurrency: list[PositiveInt] = [4, 16]
    """Texts at once, as in a server: the gain there is predicted. `headstart serve-check`
    measures it."""
    fp32_check_prompts: NonNegativeInt = 4
    """Prompts checked in float32 for equality with plain greedy decoding. 0: no check."""

    @model_validator(mode="after")
    def _check(self) -> "EvalConfig":
        numbers = [t for t in self.temperatures if t != "model"]
        if not self.temperatures or min(numbers, default=0) < 0:
            raise ValueError("temperatures needs one value or more: 0 (greedy), above, or model")
        chooses = set(self.decoders) <= {"heuristic", "cost", "hybrid"}  # K by themselves
        for name in ("seeds", "decoders", *(() if chooses else ("num_assistant_tokens",))):
            if not getattr(self, name):
                raise ValueError(f"{name} needs one value or more")
        several = ("temperatures", "decoders", "num_assistant_tokens", "draft_models", "seeds")
        for name in (*several, "concurrency"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} names one twice: {getattr(self, name)}")
        if not any(numbers) and (self.top_k is not None or self.top_p < 1):
            raise ValueError(
                "top_k and top_p are of sampling: give a temperature above 0 too; model has its own"
            )
        if self.temperatures == [0] and self.seeds != [0, 1]:
            raise ValueError("seeds are of sampling: give a temperature above 0 too, or model")
        if ("draft-model" in self.decoders) != bool(self.draft_models):
            raise ValueError("the decoder draft-model and draft_models go together: give both")
        return self


class WandbConfig(Section):
    mode: Literal["disabled", "offline", "online"] = "disabled"
    """`offline` writes a local folder and needs no account."""
    project: str = "headstart"
    """Project that the run is logged to."""
    upload: list[Literal["config", "system", "console", "head"]] = []
    """What is logged beside the metrics: the resolved configuration, readings of the machine, the
    terminal's output, the best head. None of it unless it is named here."""


class Config(Section):
    """The whole configuration of one run."""

    output_dir: Folder = Path("runs/unnamed")
    """Folder to write. A run's holds config.yaml, metrics.jsonl, checkpoints/, head/ and
    eval/, and is runs/NAME for a recipe NAME unless another is given."""
    seed: NonNegativeInt = 0
    """Seed of the data order, the anchors, the negatives and the head's start."""
    target: TargetConfig = TargetConfig()
    head: HeadConfig = HeadConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig | None = EvalConfig()
    """Evaluation after training. null: none."""
    wandb: WandbConfig = WandbConfig()
