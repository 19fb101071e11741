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
from pkgutil import iter_modules

__version__ = "0.1.0"

# public name -> the module that holds it
_NAMES = {
    "load": "models.loading",
    "LanguageModel": "models.language_model",
    "ARCHITECTURES": "architectures",
    "EditRequest": "records.requests",
    "read_requests": "records.requests",
    "read_texts": "records.requests",
    "context_templates": "models.prompts",
    "second_moment": "keys.moments",
    "second_moments": "keys.moments",
    "edit": "methods.verbs",
    "edit_batch": "methods.verbs",
    "edit_sequence": "methods.verbs",
    "Guard": "methods.guard",
    "METHODS": "methods.table",
    "Edit": "edits.edit",
    "applied": "edits.overlays",
    "unedited": "edits.overlays",
    "regularise": "edits.regularisers",
    "accumulated": "edits.regularisers",
    "delta_statistics": "edits.statistics",
    "save_edits": "edits.edit_files",
    "load_edits": "edits.edit_files",
    "collapse_risk": "studies.risk",
    "damage": "studies.damage",
    "perplexity": "studies.metrics",
    "edit_metrics": "studies.metrics",
    "generation_metrics": "studies.generation",
    "task_scores": "studies.task_scores",
    "one_edit": "studies.one_edit",
    "layer_sweep": "studies.layer_sweep",
    "run_notebook": "batch.run",
    "sweep": "batch.sweep",
    "results": "records.tables",
    "NbkitError": "errors",
}
__all__ = ["__version__", *_NAMES]


def __getattr__(name):
    if name in _NAMES:
        value = getattr(import_module(f"{__name__}.{_NAMES[name]}"), name)
    elif name in _modules():
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # the next access no longer comes here
    return value


def __dir__():
    return sorted({*globals(), *_NAMES, *_modules()})


def _modules():
    return {module.name for module in iter_modules(__path__) if not module.name.startswith("_")}
