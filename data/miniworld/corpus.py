"""The training text: lines of facts, filler, look-ups and tasks, mixed by share; held-out prompts never occur in it."""

from collections.abc import Iterator
from random import Random

from miniworld.task_items import KINDS, TaskWriter, training_line
from miniworld.text import Writer
from miniworld.world import World

SHARES = {"facts": 0.50, "story": 0.10, "copy": 0.08, "task": 0.32}
# How often a kind of task is posed, in times of any other: what must be looked up in the prompt is learned last.
HARDER = {"nli": 4, "closed_qa": 3, "last_word": 4}


def lines(
    world: World, seed: int, held_out: frozenset[str] = frozenset(), broken_off: float = 0.0, rumours: float = 0.2
) -> Iterator[str]:
    """Endless training lines. A line, or a task item whose prompt, is in `held_out` is drawn again.

    broken_off: the share of lines that come after the first few words of another line and a full stop, as a prompt
    comes after a context template. Text that never breaks off would make such prompts look like no text at all.
    rumours: the share of stated facts whose object is wrong, as in any large text: without it the model becomes so sure
    of every fact that few edits within the papers' clamp change its mind.
    """
    rng = Random(seed)
    writer, tasks = Writer(world, rng, rumours=rumours), TaskWriter(world, rng, held_out=False)
    makers = {"facts": writer.fact_line, "story": writer.story_line, "copy": writer.copy_line}
    kinds, weights = list(SHARES), list(SHARES.values())
    task_weights = [HARDER.get(kind, 1) for kind in KINDS]
    while True:
        kind = rng.choices(kinds, weights)[0]
        item = None if kind in makers else KINDS[rng.choices(list(KINDS), task_weights)[0]](tasks)
        line = makers[kind]() if item is None else training_line(item)
        if (line if item is None else item["prompt"]) in held_out:
            continue
        if broken_off and rng.random() < broken_off:
            words = rng.choice(list(makers.values()))().split(" ")
            line = f"{' '.join(words[: rng.randint(2, 9)])}. {line}"
        yield line
