"""The table of architectures, and a clear refusal of every model that cannot be edited."""

import json

import pytest
import torch
import transformers
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file, save_file

from nbkit import paths
from nbkit.architectures import ARCHITECTURES
from nbkit.edits.edit import Edit
from nbkit.edits.overlays import applied
from nbkit.edits.updates import LowRank
from nbkit.errors import ModelError
from nbkit.models import kept, loading
from nbkit.models.language_model import LanguageModel
from nbkit.models.loading import embedded_models, load


@pytest.fixture
def folder(tiny, tmp_path):
    """A saved model, as a user's own folder."""
    tiny.model.float().save_pretrained(tmp_path / "own-model")
    tiny.tokenizer.save_pretrained(tmp_path / "own-model")
    return tmp_path / "own-model"


def config_only(path, config):
    config.save_pretrained(path)
    return path


def test_the_table_has_the_promised_rows():
    expected = {"gpt2", "gptj", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi", "opt"}
    assert expected <= set(ARCHITECTURES)


def test_sizes_and_names(lm):
    assert (lm.n_layers, lm.d_model, lm.d_mlp, lm.max_length) == (3, 32, 48, 96)
    for layer in range(lm.n_layers):
        assert dict(lm.model.named_parameters())[lm.weight_name(layer)] is lm.weight(layer)
        assert lm.weight(layer).shape == ((48, 32) if lm.architecture.transposed else (32, 48))
        assert isinstance(lm.projection(layer), torch.nn.Linear) is not lm.architecture.transposed


def test_the_other_paths_of_the_table_exist(lm):
    architecture = lm.architecture
    lm.model.get_submodule(architecture.final_norm)
    for layer in range(lm.n_layers):
        lm.model.get_submodule(architecture.block.format(layer=layer))
        lm.model.get_submodule(architecture.attention_path(layer))


def test_adds_bos_is_what_the_tokenizer_does(lm):
    first = lm.tokenizer("Vouda").input_ids[0]
    assert (first == lm.tokenizer.bos_token_id) is lm.architecture.adds_bos


def test_wrap_switches_dropout_and_gradients_off(tiny):
    assert not tiny.model.training
    assert not any(parameter.requires_grad for parameter in tiny.model.parameters())
    assert tiny.tokenizer.pad_token_id is not None
    assert tiny.device.type == "cpu" and tiny.dtype == torch.float64


@pytest.mark.parametrize("layer", [3, 40, -1, 1.0, True, "1", None])
def test_a_layer_that_does_not_exist(tiny, layer):
    with pytest.raises(ModelError, match=r"does not exist in tiny-gpt2 \(3 layers, 0 to 2\)"):
        tiny.weight(layer)


def test_a_meta_weight_is_refused(tiny):
    tiny.projection(1).weight = torch.nn.Parameter(tiny.weight(1).to("meta"), requires_grad=False)
    with pytest.raises(ModelError, match="layer 1 is offloaded"):
        tiny.projection(1)
    tiny.projection(0)


def test_float64_is_refused_where_it_makes_nan(make_lm):
    with pytest.raises(ModelError, match="gemma2 models cannot be run in float64"):
        make_lm("gemma2", dtype=torch.float64)


def test_a_slow_tokenizer_is_refused(tiny):
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="not a fast one"):
        LanguageModel.wrap(tiny.model, Slow(), "mine")


def test_a_saved_model_keeps_the_defaults_of_what_it_was(tiny, tmp_path):
    tiny.name = "someone/GPT2-XL"
    tiny.save(tmp_path / "edited")
    again = load(tmp_path / "edited", device="cpu")
    assert (again.title, again.known_as) == ("edited", "GPT2-XL")
    again.save(tmp_path / "twice")
    assert load(tmp_path / "twice", device="cpu").known_as == "GPT2-XL"
    (tmp_path / "twice" / "nbkit.json").write_text("{")
    with pytest.raises(ModelError, match="nbkit.json is damaged"):
        load(tmp_path / "twice", device="cpu")


def test_a_local_folder_is_loaded_as_it_was_saved(tiny, folder):
    lm = load(folder)
    assert lm.dtype == torch.float32 and lm.name == str(folder)
    for (name, parameter), (_, before) in zip(lm.model.named_parameters(), tiny.model.named_parameters(), strict=True):
        assert torch.equal(parameter, before), name


def test_float32_on_a_cpu_whatever_the_checkpoint_holds(tiny, folder):
    tiny.model.half().save_pretrained(folder)
    assert load(folder, device="cpu").dtype == torch.float32
    assert load(folder, device="cpu", dtype="float64").dtype == torch.float64
    assert load(folder, device="cpu", dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ModelError, match="unknown dtype 'float31'"):
        load(folder, dtype="float31")


def test_an_embedded_model_is_found_by_its_name(folder, monkeypatch, tmp_path):
    (tmp_path / "models").mkdir()
    folder.rename(tmp_path / "models" / "smallworld")
    monkeypatch.setattr(paths, "DATA", tmp_path)
    assert embedded_models() == ["smallworld"]
    assert load("smallworld").name == "smallworld"


def test_an_unknown_name_lists_the_embedded_ones(folder, monkeypatch, tmp_path):
    (tmp_path / "models").mkdir()
    folder.rename(tmp_path / "models" / "smallworld")
    monkeypatch.setattr(paths, "DATA", tmp_path)
    with pytest.raises(ModelError, match=r"no model 'bigworld': embedded are smallworld.* OWNER/NAME"):
        load("bigworld")


@pytest.mark.parametrize("name", ["nobody/nothing", "gpt2-xl"])
def test_an_id_of_the_hub_is_asked_for_once(name, monkeypatch, tmp_path):
    asked = []

    def out_of_reach(url):
        asked.append(url)
        raise OfflineModeIsEnabled("no connection")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(loading, "get_hf_file_metadata", out_of_reach)
    monkeypatch.setattr(loading, "AutoConfig", None)  # transformers would ask six times for each file
    with pytest.raises(ModelError, match=f"'{name}' is neither .* out of reach"):
        load(name)
    assert len(asked) == 1


def test_a_mistyped_name_is_not_asked_for_at_all(monkeypatch):
    monkeypatch.setattr(loading, "get_hf_file_metadata", None)
    for name, meant in (("gtp2", "gpt2"), ("miniworld-gtp2", "miniworld-gpt2"), ("./miniworld-gpt", "miniworld-gpt2")):
        with pytest.raises(ModelError, match=f"did you mean .*{meant}"):
            load(name)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.BertConfig(), r"encoder-only \(bert\)"),
        (transformers.RobertaConfig(), r"encoder-only \(roberta\)"),
        (transformers.BartConfig(), r"encoder-decoder \(bart\)"),
        (transformers.BloomConfig(), "unknown architecture 'bloom'; known: gpt2, gptj"),
    ],
)
def test_the_wrong_kind_of_model_is_refused_before_its_weights_are_read(tmp_path, config, message):
    with pytest.raises(ModelError, match=message):
        load(config_only(tmp_path / "model", config))


def test_a_model_type_that_nobody_knows(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
    with pytest.raises(ModelError, match="no-such-type"):
        load(tmp_path)


def test_a_truncated_weights_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="own-model: its weights .*cannot be read"):
        load(folder)


def test_a_weights_file_of_noise(folder):
    (folder / "model.safetensors").write_bytes(b"\x00\xff" * 500)
    with pytest.raises(ModelError, match="own-model: its weights .*cannot be read"):
        load(folder)


def test_no_weights_file(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="own-model: its weights .*cannot be read"):
        load(folder)


def test_missing_weights_are_not_made_up(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.h.1.mlp.c_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lack the weights transformer.h.1.mlp.c_proj.weight"):
        load(folder)


def test_weights_of_another_shape(folder):
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.1.mlp.c_proj.weight"] = torch.zeros(5, 5)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="own-model"):
        load(folder)


def test_nan_weights(folder):
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.1.mlp.c_proj.weight"][3, 3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="transformer.h.1.mlp.c_proj.weight holds NaN"):
        load(folder)


def test_a_tokenizer_with_another_bos_habit_is_pointed_out(make_lm, folder):
    make_lm("opt").tokenizer.save_pretrained(folder)
    with pytest.warns(UserWarning, match="puts a token before each text, unlike its family's"):
        load(folder)


def test_the_hash_tells_weights_and_configurations_apart(make_lm, tiny):
    assert tiny.hash == make_lm("gpt2").hash
    assert len({tiny.hash, make_lm("gpt2", seed=1).hash, make_lm("gpt2", layer_norm_epsilon=1e-3).hash}) == 3
    assert tiny.hash != make_lm("gpt2", dtype=torch.float32).hash


@pytest.mark.parametrize("asked_before", [True, False])
def test_the_hash_follows_an_edit_and_comes_back(make_lm, tiny, asked_before):
    clean = tiny.hash if asked_before else make_lm("gpt2").hash
    with applied(tiny, Edit({tiny.weight_name(1): LowRank(torch.ones(32, 1), torch.ones(1, 48))})):
        assert tiny.hash != clean
    assert tiny.hash == clean


# --- kept between the runs of a sweep ---------------------------------------------------------------------------------


@pytest.fixture
def keeping(monkeypatch):
    """As the kernel of a sweep has it."""
    for name in ("_free", "_lent"):
        monkeypatch.setattr(kept, name, {})
    monkeypatch.setenv(kept.SETTING, "1")


def test_the_next_run_is_given_the_model_of_the_last(folder, keeping):
    first = load(folder, device="cpu")
    assert load(folder, device="cpu").model is not first.model  # a run's two models never share weights
    model, first = first.model, None
    other = load(folder, device="cpu", dtype="float64").model
    kept.take_back()
    again = load(folder, device="cpu", dtype="float64")
    assert again.model is other
    assert again.n_applied == 0
    assert load(folder, device="cpu").model is not model  # another had been loaded since, which was kept


def test_an_edited_model_is_not_handed_out_again(folder, keeping):
    first = load(folder, device="cpu")
    before, model = first.hash, first.model
    with torch.no_grad():
        first.weight(1).add_(1e-3)
    kept.take_back()
    second = load(folder, device="cpu")
    assert second.hash == before
    assert second.model is not model


def test_a_model_whose_files_have_changed_is_loaded_anew(folder, keeping):
    model = load(folder, device="cpu").model
    kept.take_back()
    doubled = {name: 2 * weight for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(doubled, folder / "model.safetensors", {"format": "pt"})
    assert load(folder, device="cpu").model is not model


def test_nothing_is_kept_outside_a_sweep(folder):
    load(folder, device="cpu")
    kept.take_back()
    assert not kept._free
