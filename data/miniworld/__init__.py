"""miniworld: a made-up world, its texts and tasks, and the small language models trained on them.

`world` invents the entities and facts, `text` writes sentences about them, `tasks` poses the ten kinds of task,
`files` writes all of it as the data files that the rest of nbkit reads. `corpus` mixes the training text, `tokenizer`
and `train` make the model, `measures` and `card` say what it is like, `ladder` when it became so.
"""
