"""Names of what comes with the project: worlds, their files below `data/`, and the models trained on them.

Files are relative to `paths.DATA`. A world added here is found by all of nbkit. Beside them, how the name of a model
becomes a place: without torch and without a network, so that a mistyped one is refused at once.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path

from nbkit import paths
from nbkit.errors import ModelError
from nbkit.records.bounds import shown


@dataclass(frozen=True)
class World:
    """The files of one made-up world."""

    requests: str  # to edit, and held out from the training of MEND
    questions: str  # the same edits asked as questions, their subject never first
    facts: str  # all of them, as requests
    texts: str  # held out, for perplexity
    training_texts: str  # one a line, for second moments and the training of MEND


WORLDS = {
    "miniworld": World(
        "miniworld/requests.json",
        "miniworld/questions.json",
        "miniworld/facts.json",
        "miniworld/perplexity.json",
        "miniworld/text.txt",
    )
}
# name, below data/models -> the world that it was trained on
MODELS = {"miniworld-gpt2": "miniworld", "miniworld-llama": "miniworld", "miniworld-t5": "miniworld"}

# what `read_requests` and `read_texts` know by name
REQUESTS = {name: world.requests for name, world in WORLDS.items()}
REQUESTS |= {f"{name}-questions": world.questions for name, world in WORLDS.items()}
REQUESTS |= {f"{name}-facts": world.facts for name, world in WORLDS.items()}
TEXTS = {name: world.texts for name, world in WORLDS.items()}
TEXTS |= {f"{name}-training": world.training_texts for name, world in WORLDS.items()}
TEXTS |= {f"{name}-training-lines": world.training_texts for name, world in WORLDS.items()}
DOCUMENTS = {f"{name}-training": 200 for name in WORLDS}  # read as documents of so many lines

# Models that the Hugging Face hub serves under a name without an owner, and that nbkit can read.
HUB_WITHOUT_OWNER = (
    "distilgpt2", "gpt2", "gpt2-large", "gpt2-medium", "gpt2-xl", "t5-11b", "t5-3b", "t5-base", "t5-large", "t5-small",
)  # fmt: skip


def embedded_models() -> list[str]:
    """Names of the models that come with the project and are there."""
    return sorted(folder.parent.name for folder in (paths.DATA / "models").glob("*/config.json"))


def locate_model(name: str, folder: str | Path = ".") -> Path | str:
    """Where the model of that name is: the folder of an embedded or a local one, else the name as an id of the hub.

    folder: what a relative path counts from. Ids of the hub are OWNER/NAME, the few of `HUB_WITHOUT_OWNER`, and those
    that the local cache of the hub holds; whether one exists is not asked. ModelError, with the nearest names, for
    what can be none of these: a path without a folder, a folder without a model, any other name without an owner.
    """
    if name in embedded_models():
        return paths.DATA / "models" / name
    try:
        place = Path(folder, Path(name).expanduser())
        here = place.is_dir()
    except (OSError, RuntimeError) as error:  # too long a name, or the home of a user whom nobody knows
        raise ModelError(f"no model is at {shown(name)}: {error}") from error
    if here:
        if not (place / "config.json").is_file():
            raise ModelError(f"the folder {name} holds no model: it has no config.json{nearest_models(name, folder)}")
        return place
    if name in MODELS:
        raise ModelError(
            f"the embedded model {name} is not in {paths.DATA / 'models'}; `make miniworld MODEL={name}` trains it"
        )
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"there is no folder {place.resolve()} to load a model from{nearest_models(name, folder)}")
    if "/" not in name and name not in HUB_WITHOUT_OWNER and name not in cached_models():
        raise ModelError(
            f"there is no model {name!r}: embedded are {', '.join(embedded_models()) or 'none'}, there is no folder of "
            f"that name, and ids of the Hugging Face hub are OWNER/NAME{nearest_models(name, folder)}"
        )
    return name


def cached_models() -> list[str]:
    """Ids of the models that the local cache of the Hugging Face hub holds, whole or in part."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = Path(HF_HUB_CACHE).glob("models--*")
    return sorted(found.name.removeprefix("models--").replace("--", "/") for found in folders)


def nearest_models(name: str, folder: str | Path = ".") -> str:
    """"; did you mean ...?" with the models at hand whose names are nearest; the end of a message."""
    parent = Path(folder, Path(name).expanduser()).parent
    local = {found.parent.name: str(found.parent) for found in parent.glob("*/config.json")}
    local |= {found.parent.name: str(found.parent) for found in Path(folder).glob("*/config.json")}
    ids = [*HUB_WITHOUT_OWNER, *cached_models()]
    known = {each.rsplit("/", 1)[-1]: each for each in ids} | {each: each for each in ids} | local
    known |= {each: each for each in embedded_models()}
    known.pop(name, None)
    close = [*difflib.get_close_matches(name, known), *difflib.get_close_matches(Path(name).name, known)]
    return f"; did you mean {' or '.join(dict.fromkeys(known[each] for each in close))}?" if close else ""
