"""Names of what comes with the project: worlds, their files below `data/`, and the models trained on them.

Files are relative to `paths.DATA`. A world added here is found by all of nbkit.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """The files of one made-up world."""

    requests: str  # to edit, and held out from the training of MEND
    facts: str  # all of them, as requests
    texts: str  # held out, for perplexity
    training_texts: str  # one a line, for second moments and the training of MEND


WORLDS = {
    "miniworld": World(
        "miniworld/requests.json", "miniworld/facts.json", "miniworld/perplexity.json", "miniworld/text.txt"
    )
}
# name, below data/models -> the world that it was trained on
MODELS = {"miniworld-gpt2": "miniworld", "miniworld-llama": "miniworld", "miniworld-t5": "miniworld"}

# what `read_requests` and `read_texts` know by name
REQUESTS = {name: world.requests for name, world in WORLDS.items()}
REQUESTS |= {f"{name}-facts": world.facts for name, world in WORLDS.items()}
TEXTS = {name: world.texts for name, world in WORLDS.items()}
TEXTS |= {f"{name}-training": world.training_texts for name, world in WORLDS.items()}
TEXTS |= {f"{name}-training-lines": world.training_texts for name, world in WORLDS.items()}
DOCUMENTS = {f"{name}-training": 200 for name in WORLDS}  # read as documents of so many lines
