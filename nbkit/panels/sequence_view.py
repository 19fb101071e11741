from ipywidgets import VBox


def sequences():
    return VBox()
