"""How the two sides of an encoder-decoder read a text, for its keys. Nothing of such a model is edited.

The encoder reads a text as its tokenizer writes it (T5's ends with </s>), and every token sees all others. The decoder
reads it as a language model would: behind its start token, which stands at position 0 as a BOS does elsewhere, without
an end, and each token sees those before it. Its encoder, which it also attends to, reads an empty text then: one
end-of-text token.
"""

import copy

import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nbkit.architectures import Side
from nbkit.errors import ModelError
from nbkit.models.rows import Batch


def tokenizer_of(side: Side, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer as it is, or for the decoder a copy that puts the decoder's start token before each text.

    ModelError if the configuration does not say which token that is, or which one ends a text.
    """
    if side == "encoder":
        return tokenizer
    start = model.config.decoder_start_token_id
    if start is None or model.config.eos_token_id is None:
        raise ModelError("the decoder's side needs decoder_start_token_id and eos_token_id in the configuration")
    before, token = copy.deepcopy(tokenizer), tokenizer.convert_ids_to_tokens(start)
    before.backend_tokenizer.post_processor = TemplateProcessing(single=[token, "$A"], special_tokens=[(token, start)])
    return before


def read(model: PreTrainedModel, side: Side, batch: Batch) -> None:
    """One pass through the blocks of a side, for hooks to look into."""
    if side == "encoder":
        model.get_encoder()(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        return
    empty = torch.full_like(batch.input_ids[:, :1], model.config.eos_token_id)
    model(
        input_ids=empty,
        attention_mask=torch.ones_like(empty),
        decoder_input_ids=batch.input_ids,
        decoder_attention_mask=batch.attention_mask,
        use_cache=False,
    )
