"""A button that puts a text on the clipboard, which a page allows only where it was clicked."""

import anywidget
import traitlets

_ESM = """
function render({ model, el }) {
  const button = document.createElement("button");
  button.className = "lm-Widget jupyter-widgets jupyter-button widget-button";
  button.style.width = "auto";
  button.textContent = "Copy as code";
  const told = document.createElement("span");
  told.setAttribute("role", "status");
  told.style.marginLeft = "8px";
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(model.get("text"));
      told.textContent = "copied";
    } catch (error) {
      told.textContent = "the browser does not allow it: select the lines and copy them (" + error.message + ")";
    }
  });
  el.append(button, told);
}
export default { render };
"""


class CopyButton(anywidget.AnyWidget):
    """Copies `text`."""

    _esm = _ESM
    text = traitlets.Unicode("").tag(sync=True)
