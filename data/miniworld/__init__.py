"""miniworld: a made-up world, its texts and tasks, and the small language models trained on them.

`world` invents the entities and facts, `text` writes sentences about them, `tasks` poses the ten kinds of task,
`files` writes all of it as the data files that the rest of nbkit reads. `corpus` mixes the training text, `windows`
cuts it, `recipe` says how a model is trained and `families` how it is built, `tokenizer` and `train` make it.
`measures` and `card` say what it is like, `efficacy` where it is edited best, `ladder` when it became so, `tuning`
which settings each method gets.
"""
