"""Widgets for JupyterLab, each the view of a function that a script can call."""
