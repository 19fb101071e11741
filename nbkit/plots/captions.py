"""What every caption says of its figure: which model, and what was read.

    caption = f"Perplexity after single edits. n = 120. {sources(lm, requests=data, texts=texts)}"
"""

from pathlib import Path


def sources(lm, **read: str | None) -> str:
    """The closing sentence of a caption.

    Args:
        lm: a model, named by its title: never by a folder of one machine.
        read: what was read, by what it is for ("requests", "texts", "C"): the names or files; None is left out.
    """
    dtype = str(lm.dtype).removeprefix("torch.")
    files = [f"{what} of {Path(name).name}" for what, name in read.items() if name is not None]
    return f"{lm.title} in {dtype}, {' and '.join([', '.join(files[:-1]), files[-1]] if files[1:] else files)}."
