"""nbkit: edit the knowledge of a language model, and measure what else the edit changed.

    import nbkit

    lm = nbkit.load("miniworld-gpt2")
    requests = nbkit.read_requests("miniworld", limit=10, seed=0)
    edits = nbkit.edit(lm, requests, method="rome")
    nbkit.perplexity(lm, texts, edits=edits)

Names are resolved on first use, so that `import nbkit` is immediate and what needs no model (requests, results,
plots) never imports torch.
"""

from importlib import import_module

__version__ = "0.1.0"

# public name -> the module that holds it
_NAMES = {
    "load": "models",
    "LanguageModel": "models",
    "ARCHITECTURES": "models",
    "EditRequest": "requests",
    "read_requests": "requests",
    "context_templates": "prompts",
    "second_moment": "moments",
    "edit": "methods",
    "edit_sequence": "methods",
    "METHODS": "methods",
    "Edit": "edits",
    "applied": "edits",
    "perplexity": "metrics",
    "edit_metrics": "metrics",
    "task_scores": "tasks",
    "run_notebook": "batch",
    "NbkitError": "errors",
}
_MODULES = {
    "batch", "edits", "errors", "hooks", "keys", "methods", "metrics", "miniworld", "models", "moments", "paths",
    "plots", "prompts", "replay", "requests", "results", "studies", "tasks",
}  # fmt: skip

__all__ = ["__version__", *_NAMES]


def __getattr__(name):
    if name in _NAMES:
        value = getattr(import_module(f"{__name__}.{_NAMES[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # the next access no longer comes here
    return value


def __dir__():
    return sorted({*globals(), *_NAMES, *_MODULES})
