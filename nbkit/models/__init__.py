"""The language model: loading it, giving it text, and running only as much of it as a question needs."""
