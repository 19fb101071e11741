"""Keys of both sides of an encoder-decoder, and a clear refusal of everything else."""

import numpy as np
import pytest
import torch
import transformers
from tokenizers import processors

import nbkit
from nbkit.architectures import ENCODER_DECODERS
from nbkit.edits.edit import Edit
from nbkit.edits.updates import LowRank
from nbkit.errors import ModelError
from nbkit.keys import geometry
from nbkit.keys.extract import keys, keys_and_values, token_keys
from nbkit.models.language_model import LanguageModel
from nbkit.models.prompts import find_subjects
from nbkit.studies.task_scores import task_scores

N_LAYERS = {"encoder": 3, "decoder": 2}
START, END = 1, 0  # token ids


@pytest.fixture
def parts(tiny):
    """A tiny T5 with random weights, and a tokenizer that ends every text as T5's does."""
    config = transformers.T5Config(
        vocab_size=len(tiny.tokenizer), d_model=32, d_kv=8, d_ff=48, num_layers=3, num_decoder_layers=2, num_heads=4,
        decoder_start_token_id=START, eos_token_id=END, pad_token_id=END, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.T5ForConditionalGeneration(config).eval().double()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    end = processors.TemplateProcessing(single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", END)])
    steps = [processors.ByteLevel(trim_offsets=True), end]
    tiny.tokenizer.backend_tokenizer.post_processor = processors.Sequence(steps)
    return model, tiny.tokenizer


@pytest.fixture(params=["encoder", "decoder"])
def side(request) -> str:
    return request.param


@pytest.fixture
def t5(parts, side) -> LanguageModel:
    return LanguageModel.wrap(*parts, "tiny-t5", side)


def keys_by_hand(model, tokenizer, side: str, text: str, layer: int) -> torch.Tensor:
    """What goes into the projection of one layer, (token, d_mlp), as a plain hook sees it; `model` is transformers'."""
    block = model.encoder.block[layer] if side == "encoder" else model.decoder.block[layer]
    seen = []
    handle = block.layer[-1].DenseReluDense.wo.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    ids = tokenizer(text, add_special_tokens=False).input_ids
    with torch.no_grad():
        if side == "encoder":
            model.encoder(input_ids=torch.tensor([[*ids, END]]))
        else:
            model(input_ids=torch.tensor([[END]]), decoder_input_ids=torch.tensor([[START, *ids]]))
    handle.remove()
    return seen[0][0]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To what attention's softmax, which is in float32, leaves of float64."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())


def test_the_paths_of_the_table_exist(t5, side):
    assert (t5.n_layers, t5.d_model, t5.d_mlp) == (N_LAYERS[side], 32, 48)
    t5.model.get_submodule(t5.architecture.final_norm)
    for layer in range(t5.n_layers):
        assert dict(t5.model.named_parameters())[t5.weight_name(layer)] is t5.weight(layer)
        t5.block(layer), t5.attention(layer)
    with pytest.raises(ModelError, match=f"layer 3 does not exist.*{N_LAYERS[side]} layers"):
        t5.check_layer(3)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_token_keys_are_what_a_plain_hook_sees(t5, parts, side, texts, padding):
    for layer in range(t5.n_layers):
        found = token_keys(t5, texts, layer, batch_size=3, padding=padding)
        for text, of_text in zip(texts, found, strict=True):
            close(of_text, keys_by_hand(*parts, side, text, layer))


def test_keys_at_the_subject_s_last_token(t5, parts, side, requests, contexts):
    found = keys(t5, requests, 1, contexts)
    for i, request in enumerate(requests):
        for j, context in enumerate(contexts):
            prompt = context.replace("{}", request.prompt)
            _, (index,) = find_subjects(t5, [prompt], [request.subject])
            n_before = len(parts[1](prompt.split("{}")[0] + request.subject, add_special_tokens=False).input_ids)
            assert index == n_before - (side == "encoder"), "behind the start token, on the decoder's side"
            close(found[i, j], keys_by_hand(*parts, side, prompt.replace("{}", request.subject), 1)[index])
    prompts = [context.replace("{}", requests[0].prompt) for context in contexts]
    values = keys_and_values(t5, prompts, [requests[0].subject] * len(contexts), 1).values
    close(values, found[0] @ t5.weight(1).T)


def test_a_later_token_reaches_earlier_keys_in_the_encoder_only(t5, side):
    one, other = token_keys(t5, ["Ann plays the harp", "Ann plays the song"], 1)
    first = 2  # tokens that both texts begin with, the decoder's start token among them
    assert torch.allclose(one[:first], other[:first], rtol=1e-4, atol=1e-5) is (side == "decoder")
    assert not torch.allclose(one[-1], other[-1], rtol=1e-2)


def test_geometry_of_both_sides(t5, requests, texts, contexts):
    frame = geometry.key_geometry(t5, requests, 1, contexts)
    assert len(frame) == len(requests) * len(contexts) and frame["similarity"].between(-1, 1.000001).all()
    alike = geometry.position_similarity(t5, texts, range(t5.n_layers), n_positions=4)
    at_first = alike[alike["position"] == 0]["similarity"]
    assert np.allclose(at_first, 1.0, atol=1e-5) is (t5.architecture.side == "decoder")  # its start token's key


def test_templates_must_be_given(t5, requests):
    with pytest.raises(ModelError, match="no context templates can be sampled; give those of another model"):
        geometry.key_geometry(t5, requests, 1)


def test_nothing_of_it_is_edited_or_measured(t5, requests, texts, contexts, tmp_path):
    delta = Edit({t5.weight_name(1): LowRank(torch.ones(32, 1), torch.ones(1, 48))})
    before = t5.weight(1).clone()
    refused = [
        *(lambda method=method: nbkit.edit(t5, requests, method, context_templates=contexts, layer=1)
          for method in nbkit.METHODS),
        lambda: nbkit.edit_batch(t5, requests),
        lambda: nbkit.edit_sequence(t5, requests),
        lambda: nbkit.collapse_risk(t5, requests, layer=1, context_templates=contexts),
        lambda: t5.apply(delta),
        lambda: nbkit.applied(t5, delta).__enter__(),
        lambda: nbkit.perplexity(t5, texts),
        lambda: nbkit.perplexity(t5, texts, edits=[delta]),
        lambda: nbkit.edit_metrics(t5, requests),
        lambda: nbkit.second_moment(t5, 1, texts),
        lambda: task_scores(t5),
        lambda: t5.save(tmp_path / "saved"),
    ]  # fmt: skip
    for attempt in refused:
        with pytest.raises(ModelError, match=r"tiny-t5 is an encoder-decoder \(t5\).*for causal decoders"):
            attempt()
    assert torch.equal(t5.weight(1), before) and not t5.n_applied and not (tmp_path / "saved").exists()


def test_a_checkpoint_is_loaded_for_either_side(parts, tmp_path, texts, side):
    model, tokenizer = parts
    model.float().save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    lm = nbkit.load(tmp_path / "t5", device="cpu", side=side)
    close(token_keys(lm, texts, 1)[0], keys_by_hand(model, tokenizer, side, texts[0], 1))
    assert nbkit.load(tmp_path / "t5", device="cpu").architecture.side == "decoder"
    with pytest.raises(ModelError, match=r"\(t5\) has no side 'middle'; it has encoder and decoder"):
        nbkit.load(tmp_path / "t5", side="middle")


def test_a_decoder_by_itself_has_no_encoder(tiny):
    with pytest.raises(ModelError, match=r"mine \(gpt2\) has no side 'encoder'; it has decoder"):
        LanguageModel.wrap(tiny.model, tiny.tokenizer, "mine", side="encoder")


def test_a_decoder_whose_start_token_is_unknown(parts):
    model, tokenizer = parts
    model.config.decoder_start_token_id = None
    with pytest.raises(ModelError, match="needs decoder_start_token_id"):
        LanguageModel.wrap(model, tokenizer)


def test_rows_of_both_sides_say_so():
    assert all(row.side == side for rows in ENCODER_DECODERS.values() for side, row in rows.items())
