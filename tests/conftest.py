"""Tiny random models of every architecture, built from configurations: nothing is downloaded.

They are float64 where that is possible, so that a test can tell a mistake from rounding.
"""

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the hub's client is imported: a test never downloads
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored, also in the processes that tests start and hang up

from pathlib import Path  # noqa: E402

import pandas as pd  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from nbkit.architectures import ARCHITECTURES  # noqa: E402
from nbkit.models.language_model import LanguageModel  # noqa: E402
from nbkit.records.requests import EditRequest  # noqa: E402

SHARED = Path(__file__).parent.parent.parent / "shared"  # third-party files, beside the checkout where there are any

N_LAYERS, D_MODEL, D_MLP, CONTEXT = 3, 32, 48, 96
_COMMON = {"num_hidden_layers": N_LAYERS, "hidden_size": D_MODEL, "num_attention_heads": 4}
_LLAMA = {
    **_COMMON,
    "intermediate_size": D_MLP,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
}
_GPT = {"n_layer": N_LAYERS, "n_embd": D_MODEL, "n_head": 4, "n_inner": D_MLP, "n_positions": CONTEXT}
_GEMMA_TEXT = {**_LLAMA, "query_pre_attn_scalar": 8, "sliding_window": 8}

CONFIGS = {
    "gpt2": (transformers.GPT2Config, _GPT),
    "gptj": (transformers.GPTJConfig, {**_GPT, "rotary_dim": 4}),
    "gpt_neox": (
        transformers.GPTNeoXConfig,
        {**_COMMON, "intermediate_size": D_MLP, "max_position_embeddings": CONTEXT},
    ),
    "llama": (transformers.LlamaConfig, _LLAMA),
    "mistral": (transformers.MistralConfig, {**_LLAMA, "sliding_window": 8}),
    "qwen2": (transformers.Qwen2Config, _LLAMA),
    "qwen3": (transformers.Qwen3Config, _LLAMA),
    "gemma2": (transformers.Gemma2Config, _GEMMA_TEXT),
    "gemma3_text": (transformers.Gemma3TextConfig, _GEMMA_TEXT),
    "gemma3": (
        transformers.Gemma3Config,
        {
            "text_config": _GEMMA_TEXT,
            "vision_config": {**_COMMON, "intermediate_size": D_MLP, "image_size": 28, "patch_size": 14},
            "mm_tokens_per_image": 4,
        },
    ),
    "phi": (transformers.PhiConfig, {**_COMMON, "intermediate_size": D_MLP, "max_position_embeddings": CONTEXT}),
    "opt": (
        transformers.OPTConfig,
        {**_COMMON, "ffn_dim": D_MLP, "word_embed_proj_dim": D_MODEL, "max_position_embeddings": CONTEXT},
    ),
}  # fmt: skip

FLOAT32_INSIDE = {"gptj", "llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gemma3"}  # in norms or attention

TEXTS = [
    "Vouda is located in Krela, and the capital of Krela is Sennifar.",
    "The mother tongue of Danielle Darrieux is French.",
    "Therefore the tower of Sennifar plays a song about Vouda.",
    "Because she was born in Krela, Ann plays the harp; I play chess and You play the drum.",
    "Ann. The river runs through Vouda {and} Sennifar: 12 bridges, 3 boats.",
]
CONTEXTS = ["{}", "The river runs. {}", "Because she plays the harp. {}", "I. {}", "You was born in Krela and. {}"]


@pytest.fixture(scope="session", params=list(ARCHITECTURES))
def kind(request) -> str:
    """Every row of the table of architectures in turn."""
    return request.param


@pytest.fixture(scope="session")
def make_lm():
    """`make_lm(kind, dtype=None, seed=0, **config)` -> LanguageModel with random weights, the same on every call."""
    return tiny_lm


@pytest.fixture
def lm(kind) -> LanguageModel:
    """A tiny model of every architecture."""
    return tiny_lm(kind)


@pytest.fixture
def tiny() -> LanguageModel:
    """A tiny GPT-2, for tests that are not about architectures."""
    return tiny_lm("gpt2")


@pytest.fixture
def tolerance(kind) -> float:
    """Relative rounding error to allow in a tiny model of this architecture."""
    if not ARCHITECTURES[kind].float64:
        return 1e-4
    return 1e-6 if kind in FLOAT32_INSIDE else 1e-10


@pytest.fixture
def requests() -> list[EditRequest]:
    """Subjects of one and of several tokens, at the start and later."""
    return [
        EditRequest("{} is located in", "Vouda", "Sennifar", "Krela", case_id=0),
        EditRequest("{} plays the", "Ann", "drum", case_id=1),
        EditRequest("The mother tongue of {} is", "Danielle Darrieux", "the song", "French", case_id=2),
    ]


@pytest.fixture
def interrupt_at():
    """`interrupt_at(patch, training, calls)`: Ctrl-C in the middle of a step, so many calls of its `loss` from now."""

    def at(patch: pytest.MonkeyPatch, training, calls: int, loss: str = "losses_of") -> None:
        left, losses_of = iter(range(calls)), getattr(training, loss)

        def interrupted(*arguments):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return losses_of(*arguments)

        patch.setattr(training, loss, interrupted)

    return at


@pytest.fixture
def texts() -> list[str]:
    """Some plain texts, of different lengths."""
    return list(TEXTS)


@pytest.fixture
def contexts() -> list[str]:
    """Context templates with prefixes of different lengths."""
    return list(CONTEXTS)


@pytest.fixture
def shared() -> Path:
    """The folder of third-party files; the test is skipped without it."""
    if not SHARED.is_dir():
        pytest.skip("needs the reference files in ../shared, which are not part of the project")
    return SHARED


@pytest.fixture(scope="session")
def world():
    """miniworld, as it is shipped."""
    from miniworld.world import build_world

    return build_world()


@pytest.fixture(scope="session")
def world_tokenizer(world) -> PreTrainedTokenizerFast:
    """The tokenizer of miniworld, trained anew: a few seconds."""
    from miniworld.tokenizer import train_tokenizer

    return train_tokenizer(world)


def tiny_lm(kind: str, dtype: torch.dtype | None = None, seed: int = 0, **config) -> LanguageModel:
    """A random model of one architecture with biases and norms that are not trivial."""
    dtype = dtype or (torch.float64 if ARCHITECTURES[kind].float64 else torch.float32)
    tokenizer = tiny_tokenizer(ARCHITECTURES[kind].adds_bos)
    config_class, arguments = CONFIGS[kind]
    special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    arguments = {**arguments, **config}
    if kind == "gemma3":
        arguments = {**arguments, "text_config": {**arguments["text_config"], "vocab_size": len(tokenizer), **special}}
        special["image_token_id"] = len(tokenizer) - 1
    else:
        special["vocab_size"] = len(tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config_class(**special, **arguments), dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, dtype=torch.float64).to(dtype)
                if parameter.dim() == 1:
                    parameter += 0.1 * noise
                else:
                    parameter.copy_(0.2 * noise)
    return LanguageModel.wrap(model, tokenizer, f"tiny-{kind}")


def tiny_tokenizer(adds_bos: bool = False, merges: int = 200) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on `TEXTS`; with `adds_bos`, "<s>" before every text. Frequent names are one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=258 + merges,
        special_tokens=["<|endoftext|>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    steps = [processors.ByteLevel(trim_offsets=True)]
    if adds_bos:
        steps.append(processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]))
    tokenizer.post_processor = processors.Sequence(steps)
    special = {"eos_token": "<|endoftext|>", "bos_token": "<s>" if adds_bos else "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture
def ax():
    """An empty axis of a column's width, in the style of a paper."""
    from matplotlib import pyplot as plt

    from nbkit import plots

    with plots.paper_style():
        fig, ax = plt.subplots(figsize=(plots.COLUMN, 2.5))
        yield ax
        plt.close(fig)


def check_frame_of_a_plot(function, frame, ax):
    """What each plot does with a frame: no rows and a missing column are named, and what it draws it leaves alone."""
    with pytest.raises(ValueError, match="no rows"):
        function(frame.iloc[:0], ax)
    with pytest.raises(ValueError, match="has no column .*; it has other"):
        function(pd.DataFrame({"other": [1]}), ax)
    before = frame.copy()
    function(frame, ax)
    pd.testing.assert_frame_equal(frame, before)
