"""A pool of differently damaged models, drawn by a rule that looks at no score: which treatments, of how many sources.

    treatments = pool(lm, requests, n_each=16, seed=0)
    pd.Series([one.source for one in treatments]).value_counts()

Every source gives the same number of treatments, of sequences a multiple of `STOPS`; scaled edits and noise, which cost
next to nothing and can be of any strength, `STRENGTHS` times as many. All single edits are of the same requests, so
that sources differ in what is done and not in what is edited. Strengths (how much of an edit, how many edits, how much
noise) are drawn evenly on a log scale, over a range in which perplexity goes from unchanged to a wreck's.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from nbkit import paths
from nbkit.edits.door import verb
from nbkit.errors import MethodError
from nbkit.keys.moments import second_moments
from nbkit.methods.hparams import hyper_parameters
from nbkit.methods.table import METHODS, method_named
from nbkit.models.language_model import LanguageModel
from nbkit.records.bounds import check_choice, check_number
from nbkit.records.lists import as_list, as_requests
from nbkit.records.provenance import digest
from nbkit.records.requests import EditRequest, read_texts
from nbkit.studies.treatments import Treatment

FACTORS = (0.1, 30.0)  # of an edit's update, by which it is scaled
KEPT = (0.1, 0.9)  # share of the entries that RECT keeps
NOISES = (0.3, 5.0)  # norm of the noise, relative to the weight's
STOPS = 4  # treatments of each sequence
STRENGTHS = 3  # factors of each scaled edit; noises for every treatment of another source
TITLES = {"ft": "FT", "kn": "KN", "mend": "MEND", "rome": "ROME", "memit": "MEMIT", "emmet": "EMMET",
          "alphaedit": "AlphaEdit", "encore": "ENCORE", "ultraedit": "UltraEdit", "locft-bf": "LocFT-BF"}  # fmt: skip
BATCHES = ("ft", "memit", "emmet", "alphaedit", "encore", "ultraedit", "locft-bf")
ROME_RECT, NOISE = "ROME with RECT", "noise"
PRUNED = "ROME sequence with PRUNE"
KINDS = {  # source: what kind of damage it is
    # One request alone gives UltraEdit next to nothing to normalise by.
    **{title: "single edit" for method, title in TITLES.items() if method != "ultraedit"},
    **{f"{TITLES[method]} scaled": "scaled edit" for method in ("ft", "rome", "memit")},
    ROME_RECT: "RECT or PRUNE",
    PRUNED: "RECT or PRUNE",
    **{f"{TITLES[method]} sequence": "sequence" for method in ("ft", "kn", "rome", "memit")},
    **{f"{TITLES[method]} batch": "batch" for method in BATCHES},
    NOISE: "noise",
}
SOURCES = tuple(KINDS)


@verb
def pool(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    n_each: int = 16,
    n_edits: int = 16,
    layers: Sequence[int] = (),
    sources: Sequence[str] | None = None,
    seed: int = 0,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Treatment]:
    """`n_each` treatments of every source (the module says of which more or fewer), each source's drawn by a generator
    of its own, so that another source changes none of the rest.

    Args:
        requests: that all are drawn from, without order. n_edits: the most in a sequence or batch, and in a sequence
            `STOPS` treatments stop at different places.
        layers: that single edits (ROME's scaled and RECT'd ones too) are made in, each drawn evenly from them and the
            method's own; KN and MEND choose theirs themselves.
        sources: some of `SOURCES`; None for all. One that the model cannot have (MEND without a network) is left out.
        settings: {method: arguments of `nbkit.edit`}, over the defaults.

    MethodError for an unknown source, and for fewer requests than n_each or n_edits.
    """
    requests = as_requests(requests)
    check_number("n_each", n_each, whole=True, least=1, most=max(1, len(requests)))
    check_number("n_edits", n_edits, whole=True, least=2, most=max(2, len(requests)))
    check_number("seed", seed, whole=True, least=0)
    for layer in layers:
        lm.check_layer(layer)
    sources = list(SOURCES) if sources is None else as_list("sources", sources, "names of sources", MethodError)
    for source in sources:
        check_choice("source", source, SOURCES)
    drawn = _Drawing(lm, requests, n_each, n_edits, list(layers), seed, dict(settings or {}))
    return [one for source in dict.fromkeys(sources) for one in drawn.of(source)]


@verb
def pool_settings(
    lm: LanguageModel,
    sources: Sequence[str],
    layers: Sequence[int] = (),
    hparams: Mapping[str, Mapping[str, Any]] | None = None,
    second_moment_texts: str | Path | None = None,
    second_moment_tokens: int | None = None,
) -> dict[str, dict[str, Any]]:
    """`settings` of `pool` as a notebook's parameters name them.

    hparams: {method: hyper-parameters}. second_moment_texts: a file, or a name that `read_texts` knows, whose keys'
    second moments the methods of `sources` that need some get, for their own layers and `layers`, over
    `second_moment_tokens`; cached in `runs/moments`. None leaves it to the methods. MethodError for an unknown method.
    """
    settings = {method: dict(given) for method, given in (hparams or {}).items()}
    methods = {method for method, title in TITLES.items() if any(source.split()[0] == title for source in sources)}
    for method in sorted(methods | set(settings)):
        if second_moment_texts is not None and method_named(method).needs_second_moment:
            parameters = hyper_parameters(lm, method, **settings.setdefault(method, {}))
            settings[method]["second_moment"] = second_moments(
                lm, sorted({*parameters.layers, *layers}), read_texts(second_moment_texts),
                n_tokens=second_moment_tokens, cache=paths.RUNS / "moments",
            )  # fmt: skip
    return settings


@dataclass(frozen=True)
class _Drawing:
    """The arguments of `pool`, and how treatments of one source are drawn with them."""

    lm: LanguageModel
    requests: list[EditRequest]
    n_each: int
    n_edits: int
    layers: list[int]
    seed: int
    settings: dict[str, Mapping[str, Any]]

    def of(self, source: str) -> Iterator[Treatment]:
        methods = {title: method for method, title in TITLES.items()}
        random, first = self.random(source), source.split()[0]
        if source == NOISE:
            for norm in _evenly(random, *NOISES, STRENGTHS * self.n_each).tolist():
                yield Treatment(source, "noise", relative_norm=norm, seed=int(random.integers(2**31)))
        elif source.endswith("sequence"):
            yield from self.sequences(source, methods[first])
        elif source == PRUNED:
            for one in self.sequences(source, "rome"):
                yield replace(one, regulariser="prune")
        elif source.endswith("batch"):
            for size in _evenly(random, 2, self.n_edits, self.n_each).round().astype(int):
                yield Treatment(source, "batch", methods[first], self.some(random, size), self.given(methods[first]))
        elif methods[first] != "mend" or self.has_mend():
            for one in self.singles(source, methods[first]):
                if source.endswith("scaled"):
                    for factor in _evenly(random, *FACTORS, STRENGTHS).tolist():
                        yield replace(one, regulariser="scale", arguments={"factor": factor})
                elif source == ROME_RECT:
                    yield replace(one, regulariser="rect", arguments={"keep": float(_evenly(random, *KEPT))})
                else:
                    yield one

    def singles(self, source: str, method: str) -> Iterator[Treatment]:
        """Of the same requests for all methods, and in the same layers for all sources of a method."""
        random = self.random(method)
        names = {field.name for field in fields(METHODS[method].parameters)} & {"layer", "layers"}
        choices = [None, *self.layers] if names else [None]  # None: the method's own
        for request in self.some(self.random("requests"), self.n_each):
            layer = choices[random.integers(len(choices))]
            at = {} if layer is None else {"layer": layer} if "layer" in names else {"layers": [layer]}
            yield Treatment(source, "single", method, (request,), {**self.given(method), **at})

    def sequences(self, source: str, method: str) -> Iterator[Treatment]:
        random, lengths = self.random(f"{method} sequence"), np.arange(1, self.n_edits + 1)
        n_stops = min(STOPS, self.n_edits, self.n_each)
        for _ in range(self.n_each // n_stops):
            order = self.some(random, self.n_edits)
            stops = random.choice(lengths, n_stops, replace=False, p=(1 / lengths) / (1 / lengths).sum())
            for stop in sorted(stops.tolist()):
                yield Treatment(source, "sequence", method, order[:stop], self.given(method))

    def some(self, random: np.random.Generator, n: int) -> tuple[EditRequest, ...]:
        return tuple(self.requests[place] for place in random.permutation(len(self.requests))[:n])

    def given(self, method: str) -> dict[str, Any]:
        return dict(self.settings.get(method, {}))

    def random(self, name: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, int(digest(name), 16)])

    def has_mend(self) -> bool:
        parameters = hyper_parameters(self.lm, "mend", **self.given("mend"))
        return all(path.is_file() for path in METHODS["mend"].files(self.lm, parameters))


def _evenly(random: np.random.Generator, low: float, high: float, n: int | None = None) -> Any:
    """Drawn evenly on a log scale."""
    return np.exp(random.uniform(np.log(low), np.log(high), n))
