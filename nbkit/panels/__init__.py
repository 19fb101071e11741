"""Widgets for JupyterLab, each the view of a function that a script can call.

    from nbkit import panels

    panels.explore("miniworld-gpt2")       # the workbook of one edit: all below, and editing
    browser = panels.requests(lm)          # the requests and their collapse risk: one is chosen
    panels.ledger(lm)                      # the edits in the weights, and taking them back
    panels.sequences()                     # stored sequences of edits, step by step

Names are resolved on first use, so that ipywidgets is not imported before a widget is wanted. A module is not named as
the function in it, which it would hide.
"""

from importlib import import_module

# public name -> the module that holds it
_NAMES = {
    "explore": "explorer",
    "requests": "request_browser",
    "RequestBrowser": "request_browser",
    "ledger": "ledger_view",
    "sequences": "sequence_view",
}
__all__ = [*_NAMES]


def __getattr__(name):
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_NAMES[name]}"), name)
    globals()[name] = value  # the next access no longer comes here
    return value


def __dir__():
    return sorted({*globals(), *_NAMES})
