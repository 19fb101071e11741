"""The papers line by line, one text at a time through the whole model: slow, and easy to hold against the formulae.

The tests hold the fast engine to these, and the benchmark measures it against them. They use nothing of the engine.
"""
