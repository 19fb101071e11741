"""What every caption says of its figure: which models, and what was read.

    caption = f"Perplexity after single edits. n = 120. {sources(lm, requests=data, texts=texts)}"
"""

from collections.abc import Sequence
from pathlib import Path


def sources(*lms, **read: str | None) -> str:
    """The closing sentence of a caption.

    Args:
        lms: one or more models, named by their titles: never by a folder of one machine.
        read: what was read, by what it is for ("requests", "texts", "C"): the names or files; None is left out.
    """
    of_dtype: dict[str, list[str]] = {}
    for lm in lms:
        of_dtype.setdefault(str(lm.dtype).removeprefix("torch."), []).append(lm.title)
    models = [f"{_listed(titles)} in {dtype}" for dtype, titles in of_dtype.items()]
    files = [f"{what} of {Path(name).name}" for what, name in read.items() if name is not None]
    return f"{_listed(models)}, {_listed(files)}."


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)
