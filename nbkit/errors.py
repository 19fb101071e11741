"""All exceptions of nbkit: each says which record, parameter or file is wrong, and what to do about it."""


class NbkitError(Exception):
    """Base of everything that nbkit raises on purpose."""


class RequestError(NbkitError, ValueError):
    """A record that is not a usable edit request; the message names its case_id or its place in the file."""


class ModelError(NbkitError, ValueError):
    """An unknown model, architecture or layer, a model that is no causal decoder, or weights that cannot be edited."""


class PromptError(NbkitError, ValueError):
    """A text that cannot be given to the model: longer than the context, or without its subject."""


class MethodError(NbkitError, ValueError):
    """An unknown method or hyper-parameter, or a value that it cannot take."""


class ParameterError(NbkitError, ValueError):
    """A notebook parameter that is unknown or of the wrong type."""


class NotebookError(NbkitError, RuntimeError):
    """A notebook that failed while it ran; the message names the cell."""


class ResultsError(NbkitError, OSError):
    """An output folder that cannot be written, or a damaged file of stored results."""
