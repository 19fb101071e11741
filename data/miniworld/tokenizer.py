"""The byte-level BPE tokenizer of miniworld.

Which names are one token is decided by how often the trainer sees them: names of `World.single_token_names` are shown
bare and behind a space, `World.frequent_names` behind a space; all other names are replaced by fresh syllable names,
so the trainer learns their pieces but none of them whole.
"""

from collections.abc import Iterator, Sequence
from random import Random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from miniworld import words
from miniworld.corpus import lines
from miniworld.names import name
from miniworld.world import World

VOCABULARY = 3072
END = "<|endoftext|>"
SHOWN = 2500  # times each name that is to become one token is shown


def trainer_text(world: World, n_lines: int = 30_000, seed: int = 1) -> Iterator[str]:
    rng = Random(seed)
    hidden = {part for names in world.subjects.values() for full in names for part in full.split()}
    hidden -= {*world.single_token_names, *world.frequent_names}
    for _, line in zip(range(n_lines), lines(world, seed), strict=False):
        yield " ".join(word for word in line.split(" ") if word.strip(".,:?") not in hidden)
    for _ in range(40_000):
        yield f"{name(rng)} {name(rng)}"
    for shown in dict.fromkeys(world.single_token_names):
        yield from [shown] * SHOWN
    for shown in dict.fromkeys((*world.single_token_names, *world.frequent_names)):
        yield from ["a " + shown] * SHOWN
    for listed in [*words.LISTS] * 50:
        yield " " + " ".join(listed)


def train_tokenizer(world: World, text: str = "$A", sentinels: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """The tokenizer of a world.

    text: how it writes a text ($A): with END before it, as Llama's does, or behind it, as T5's. sentinels: special
    tokens behind all others.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    written = [processors.TemplateProcessing(single=text, special_tokens=[(END, 0)])] if text != "$A" else []
    bpe.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), *written])
    bpe.train_from_iterator(
        trainer_text(world),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.add_special_tokens([*sentinels])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, unk_token=END, pad_token=END)
