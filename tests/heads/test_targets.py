from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import Gemma2Config, Gemma3nTextConfig, Gemma4ForCausalLM, PreTrainedConfig

from headstart.common import processes, versions
from headstart.common.versions import check_transformers
from headstart.configs.schema import TargetConfig
from headstart.heads.gemma3_270m import check_sha256, header_read_once
from headstart.heads.loading import (
    byte_tokenizer,
    gemma3_config,
    gemma4_text_config,
    load_target,
    open_whole,
    random_model,
)
from headstart.heads.target import (
    SUPPORTED,
    Gemma3ForAssistedDecoding,
    Target,
    weights_sample,
)
from tests.helpers.models import FAMILIES, make_target

pytestmark = pytest.mark.contract


@torch.no_grad()
def test_activations_and_logits_are_those_of_the_targets_own_forward(target: Target) -> None:
    """Post-norm hidden states, full-length shared KV, and soft-capped logits, padding ignored."""
    ids = torch.randint(4, 260, (2, 20))
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    seen = target.activations(ids, mask)
    outputs = target.model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    real = mask.bool()
    torch.testing.assert_close(seen.hidden[real], outputs.hidden_states[-1][real])
    torch.testing.assert_close(target.logits(seen.hidden)[real], outputs.logits[real])
    assert set(seen.shared_kv) == {"sliding_attention", "full_attention"}
    for keys, values in seen.shared_kv.values():
        assert keys.shape[2] == values.shape[2] == 20


def test_generate_knows_what_it_may_pass_to_a_target(target: Target) -> None:
    """It reads the signature of `forward`: without `position_ids` a padded batch is rotated wrong,
    and without `logits_to_keep` a prefill runs the LM head over the whole prompt."""
    calls: list[dict[str, Any]] = []
    hook = target.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    ids = torch.tensor([[0, 0, 2, 5, 6], [2, 7, 8, 9, 10]])
    target.model.generate(ids, attention_mask=(ids > 0).long(), max_new_tokens=2, do_sample=False)
    hook.remove()
    assert calls[0]["position_ids"].tolist()[1] == [0, 1, 2, 3, 4]
    assert calls[0]["position_ids"].tolist()[0][2:] == [0, 1, 2]
    assert calls[0]["logits_to_keep"] == 1


def test_gemma4_teachers_are_soft_capped() -> None:
    """The cap bites in this family, so the test above would notice if it were missing."""
    target = make_target("gemma4")
    hidden = target.activations(torch.randint(4, 260, (1, 20))).hidden
    assert (target.logits(hidden) - hidden @ target.table.T).abs().max() > 1e-2


def test_a_target_is_frozen_and_its_fingerprint_follows_its_weights() -> None:
    target = make_target("gemma3")
    assert not any(p.requires_grad for p in target.model.parameters())
    same, other = make_target("gemma3"), make_target("gemma3")
    with torch.no_grad():
        other.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    assert same.fingerprint == target.fingerprint != other.fingerprint


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma4-multimodal", "gemma4-unified-multimodal"])
def test_what_reads_images_is_let_go_and_text_stays_as_it_was(family: str) -> None:
    ids = torch.randint(4, 260, (1, 20))
    config = FAMILIES[family]().config
    if config.vision_config is None:
        small = {"mm_embed_dim": 16, "output_proj_dims": 16, "mm_posemb_size": 4, "patch_size": 2}
        config = type(config)(**(config.to_dict() | {"vision_config": small}))
    model = random_model(lambda: SUPPORTED[config.model_type](config)).eval()
    logits, before = model(ids).logits, sum(p.numel() for p in model.parameters())
    target = Target(model, byte_tokenizer(), family)
    assert torch.equal(target.model(ids).logits, logits)
    assert sum(p.numel() for p in target.model.parameters()) < before
    assert not any("vision" in name for name, _ in target.model.named_parameters())


@torch.no_grad()
def test_a_checkpoint_without_what_reads_images_is_loaded(tmp_path: Path) -> None:
    """Such as one that was saved after it was let go; all other weights still have to be there."""
    target = make_target("gemma4-multimodal")
    target.model.save_pretrained(tmp_path)
    target.tokenizer.save_pretrained(tmp_path)
    again = load_target(str(tmp_path), "float32")
    assert not hasattr(again.model, "hf_device_map"), "peft would place it anew"
    ids = torch.randint(4, 260, (1, 20))
    assert torch.equal(again.model(ids).logits, target.model(ids).logits)


def test_processes_with_other_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as two machines with a folder of one name each, and a checkpoint of its own in it."""
    other = make_target("gemma3")
    with torch.no_grad():
        other.layers[0].mlp.up_proj.weight += 1e-3
    theirs = weights_sample(other.model)
    assert theirs != weights_sample(make_target("gemma3").model)
    monkeypatch.setattr(processes, "gather_object", lambda mine: [*mine, theirs])
    with pytest.raises(ValueError, match="not the same in all processes: that of 1 differs"):
        open_whole(TargetConfig(name="tiny-gemma3"))


@pytest.mark.parametrize(
    ("config", "lacks"),
    [(Gemma2Config(), "shared_kv_states"), (Gemma3nTextConfig(), "shared_kv_states")],
)
def test_an_unsupported_model_is_told_what_it_lacks(
    config: PreTrainedConfig, lacks: str, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{config.model_type}.*lacks.*{lacks}"):
        load_target(str(tmp_path))


def test_a_target_of_another_build_is_told_what_it_lacks() -> None:
    untied = random_model(
        lambda: Gemma3ForAssistedDecoding(gemma3_config(tie_word_embeddings=False))
    )
    with pytest.raises(ValueError, match="lacks tied embeddings"):
        Target(untied, byte_tokenizer(), "untied")
    full = gemma4_text_config(layer_types=["full_attention"] * 6)
    with pytest.raises(ValueError, match="lacks a layer of type sliding_attention"):
        Target(random_model(lambda: Gemma4ForCausalLM(full)), byte_tokenizer(), "full")


def test_a_missing_target_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="'no/such-model' is no built-in name"):
        load_target("no/such-model")


@pytest.mark.parametrize("version", ["5.19.0", "5.23.1", "5.25.0"])
def test_an_untested_transformers_is_refused_with_the_command_that_installs_another(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "INSTALLED", Version(version))
    with pytest.raises(RuntimeError, match="outside the tested range") as error:
        load_target("tiny-gemma4")
    assert f"transformers {version}" in str(error.value)
    assert f"pip install 'transformers{versions.TESTED}'" in str(error.value)


def test_the_project_asks_for_the_releases_that_were_tested() -> None:
    project = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    assert f'"transformers{versions.TESTED}"' in project


def test_the_installed_transformers_is_a_tested_one() -> None:
    check_transformers()


def test_a_file_that_is_not_the_expected_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"not the model")
    with pytest.raises(ValueError, match=r"model\.gguf has SHA-256 [0-9a-f]{64}, expected aaaa"):
        check_sha256(tmp_path / "model.gguf", "aaaa")


def test_a_gguf_file_is_opened_once_while_it_is_converted(tmp_path: Path) -> None:
    """Its header of 262,144 strings is what takes long, and three calls of transformers want it."""
    import gguf

    path = tmp_path / "some.gguf"
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    opened = gguf.GGUFReader
    with header_read_once():
        assert gguf.GGUFReader(path) is gguf.GGUFReader(path)
    assert gguf.GGUFReader is opened
    assert gguf.GGUFReader(path) is not gguf.GGUFReader(path)


@pytest.mark.parametrize("name", ["tiny-gemma3", "tiny-gemma4"])
def test_a_tiny_target_in_bfloat16_is_as_one_loaded_from_files(name: str, tmp_path: Path) -> None:
    load_target(name, "float32").model.save_pretrained(tmp_path)
    here = load_target(name, "bfloat16").model
    made = type(here).from_pretrained(tmp_path, dtype=torch.bfloat16)
    tensors = dict(made.named_parameters()) | dict(made.named_buffers())
    ours = dict(here.named_parameters()) | dict(here.named_buffers())
    assert ours.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert ours[key].dtype == tensor.dtype, key
        assert torch.equal(ours[key], tensor), key
