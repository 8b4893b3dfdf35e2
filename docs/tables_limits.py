"""Tables of how near each phase is to what its machine can do: measured, and by calculation."""

from typing import Any

from docs.tables import Results, made_of, rows_of
from headstart.configs.loader import load_config
from headstart.data.extraction import BATCH_TOKENS
from headstart.heads.describe import published_config, target_step_weights
from headstart.heads.target import source_layers
from headstart.train.memory import kv_bytes

MACHINES = {"limits": "with bfloat16", "limits-avx2": "without"}
"""Results -> what its processor has instructions for."""


@made_of(*MACHINES)
def machine_rates(found: Results) -> str:
    return rows_of("processor | dtype | matrix products | copies, read and written", [
        [machine, dtype, f"{flops / 1e9:,.0f} GFLOP/s", f"{moved / 1e9:.1f} GB/s"]
        for name, machine in MACHINES.items()
        for (dtype, flops), moved in zip(
            found[name]["gemm_flops_per_second"].items(),
            found[name]["memory_bytes_per_second"].values(),
            strict=True,
        )
    ])  # fmt: skip


FORMS = {
    "linear": "`F.linear`", "by_blocks": "by blocks", "without_onednn": "torch's own kernel",
    "other_order": "`W @ x.T`", "Packed": "packed once",
}  # fmt: skip


@made_of(*MACHINES)
def small_batch(found: Results) -> str:
    rows = []
    for name, machine in MACHINES.items():
        for dtype, by_rows in found[name]["small_batch_bytes_per_second"].items():
            for count, forms in by_rows.items():
                cells = [f"{forms[form] / 1e9:.1f}" if form in forms else "" for form in FORMS]
                rows.append([machine, dtype, count, *cells])
    return rows_of(" | ".join(["processor", "dtype", "rows", *FORMS.values()]), rows)


@made_of(
    "bench-regenerate", "bench-regenerate-float32", "bench-extract", "bench-extract-float32",
    "bench-train", "bench-train-bf16", "bench-draft", "bench-draft-bf16", "bench-loader",
)  # fmt: skip
def limits_measured(found: Results) -> str:
    told = [
        ("generation, batches of 64, bfloat16", "matrix products", "products alone / all",
         "bench-regenerate", "regenerate_over_gemm"),
        ("generation, batches of 64, float32", "matrix products", "the same",
         "bench-regenerate-float32", "regenerate_over_gemm"),
        ("extraction, bfloat16", "matrix products", "products alone / all",
         "bench-extract", "extract_over_gemm"),
        ("extraction, float32", "matrix products", "the same",
         "bench-extract-float32", "extract_over_gemm"),
        ("shards of activations", "the target", "share in which it waits for files",
         "bench-extract", "write_share"),
        ("training step, bfloat16", "matrix products", "an anchor / a token of a target forward",
         "bench-train-bf16", "step_over_forward"),
        ("training step, float32", "matrix products", "the same",
         "bench-train", "step_over_forward"),
        ("draft, bfloat16", "Python, and the weights that it reads", "a draft step / a target step",
         "bench-draft-bf16", "c_exact_ordered"),
        ("draft, float32", "the same", "the same", "bench-draft", "c_exact_ordered"),
        ("loader, E4B shapes", "Python's lock", "share of a step of 12 ms that waits for its batch",
         "bench-loader", "loader_wait_share"),
        ("loader, E4B shapes", "Python's lock", "the same, and what its threads slow a step down",
         "bench-loader", "loader_share"),
    ]  # fmt: skip
    return rows_of("phase | limit | what (`key`) | measured", [
        [phase, limit, f"{what} (`{key}`)", f"{found[file]['ratios'][key]:.2f}"]
        for phase, limit, what, file, key in told
    ])  # fmt: skip


FLOPS, BANDWIDTH = 989e12, 3.35e12  # H100 SXM, bfloat16 without sparsity, by NVIDIA's data sheet
LAUNCH = 5e-6  # seconds of the host for an operation of PyTorch, assumed
STEPS = {"gemma-4-E4B": 1455, "gemma-4-31B": 1960}
"""Operations of a decoding step, counted as in tests/test_pretended_gpu.py, over narrow layers."""
CONTEXT = 1024


def limits_h100() -> str:
    """What a decoding step and an extracting forward take on an H100, by what could limit them."""
    rows = []
    for name, recipe in (("gemma-4-E4B", "gemma4-e4b"), ("gemma-4-31B", "gemma4-31b")):
        source = published_config(f"google/{name}")
        assert source is not None
        batch = load_config(recipe).data.generation_batch_size
        weights = target_step_weights(source)
        cache = batch * _cache_bytes(source)
        for what, tokens, moved in (
            (f"decoding step of {batch} texts", batch, 2 * weights + cache),
            ("decoding step of one text", 1, 2 * weights + cache // batch),
            (f"extracting forward of {BATCH_TOKENS:,} tokens", BATCH_TOKENS, 2 * weights),
        ):
            limits = {
                "memory": moved / BANDWIDTH,
                "matrix products": 2 * weights * tokens / FLOPS,
                "launches": STEPS[name] * LAUNCH,
            }
            cells = [f"{seconds * 1000:.1f}" for seconds in limits.values()]
            rows.append([name, what, *cells, max(limits, key=lambda one: limits[one])])
    return rows_of("target | what | memory, ms | products, ms | launches, ms | limit", rows)


@made_of("bench-loader-31b")
def limits_writing(found: Results) -> str:
    """What a store takes while the target generates, beside what a thread writes."""
    figures = found["bench-loader-31b"]
    source = published_config("google/gemma-4-31B")
    assert source is not None
    batch = load_config("gemma4-31b").data.generation_batch_size
    moved = 2 * target_step_weights(source) + batch * _cache_bytes(source)
    made = batch / (moved / BANDWIDTH)
    needed, written = made * figures["bytes_per_token"], figures["write_bytes_per_second"]
    header = "tokens a second | bytes a token | MB/s to write | MB/s written | share of the thread"
    return rows_of(header, [[
        f"{made:,.0f}", f"{figures['bytes_per_token']:,.0f}", f"{needed / 1e6:.0f}",
        f"{written / 1e6:,.0f}", f"{needed / written:.0%}",
    ]])  # fmt: skip


def _cache_bytes(source: Any) -> int:
    """Keys and values of a text of `CONTEXT` tokens that a decoding step reads."""
    last = max(source_layers(source).values())
    rows = {"full_attention": CONTEXT, "sliding_attention": min(CONTEXT, source.sliding_window)}
    kinds = source.layer_types[: last + 1]
    return sum(kv_bytes(source, i, 2) * rows[kind] for i, kind in enumerate(kinds))
