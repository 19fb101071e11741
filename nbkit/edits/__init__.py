"""An edit as a value: its updates and their arithmetic, what lies in a model's weights, files, regularisers."""
