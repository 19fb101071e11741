"""A request of one's own, typed in: the fields of an EditRequest that an edit needs."""

from collections.abc import Callable

from ipywidgets import Button, HBox, Layout, Text, VBox

from nbkit.errors import NbkitError
from nbkit.panels import fragments
from nbkit.records.requests import EditRequest

FIELDS = {
    "prompt": ("prompt with {}", "{} is located in"),
    "subject": ("subject", "stands where the {} is"),
    "target_new": ("new target", "what the model shall say"),
    "target_true": ("true target", "what is true so far; may stay empty"),
}


class RequestForm(VBox):
    """Four labelled fields and what to do with them.

    accept: gets the EditRequest when its button is pressed. What EditRequest refuses, and the NbkitError that `accept`
    raises, stands in words below the fields.
    """

    def __init__(self, accept: Callable[[EditRequest], None], chosen: Callable[[], EditRequest | None]):
        self.fields = {
            name: Text(
                description=label,
                placeholder=hint,
                layout=Layout(width="100%", max_width="640px"),
                style={"description_width": "110px"},
            )
            for name, (label, hint) in FIELDS.items()
        }
        self.take = Button(description="Take this request", button_style="primary", layout=Layout(width="auto"))
        self.copy = Button(description="Start from the chosen one", layout=Layout(width="auto"))
        self.problem = fragments.html()
        self._accept, self._chosen = accept, chosen
        self.take.on_click(lambda _: self._take())
        self.copy.on_click(lambda _: self._copy())
        buttons = HBox([self.take, self.copy], layout=Layout(margin="0 0 0 114px", flex_flow="row wrap"))
        title = fragments.html("<b>A request of your own</b>")
        super().__init__([title, *self.fields.values(), buttons, self.problem])

    def read(self) -> EditRequest:
        """What the fields say, without white space at their ends; RequestError for what no method could use."""
        said = {name: field.value.strip() for name, field in self.fields.items()}
        return EditRequest(**{**said, "target_true": said["target_true"] or None})

    def fill(self, request: EditRequest) -> None:
        """Writes a request into the fields."""
        for name, field in self.fields.items():
            field.value = getattr(request, name) or ""

    def _take(self) -> None:
        try:
            self._accept(self.read())
        except NbkitError as error:
            self.problem.value = fragments.error(error)
        else:
            self.problem.value = ""

    def _copy(self) -> None:
        request = self._chosen()
        if request is None:
            self.problem.value = fragments.note("No request is chosen yet.")
        else:
            self.fill(request)
            self.problem.value = ""
