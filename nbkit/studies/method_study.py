"""What studies of edits share: a method with all that determines its rows, and where they are stored.

Rows are stored under a key made of the model, the data, every parameter and the code (records/results.py), so a study
that is interrupted goes on where it was, one with more requests or seeds computes only those, and one that is all there
takes no time. Requests count by their content, not by their place in the list; what a row was computed together with
changes it by no more than rounding.

Every study takes a `store` (None: `runs/results`), the `method` with its hyper-parameters, and `context_templates` and
`second_moment` as in `nbkit.edit`. The model is unchanged afterwards, also after an interrupt. An infinite or NaN
perplexity is a result, stored as such. `single_edits`, `batch_edits` and `sequential_edits` take `guard` and
`regularise` too: each row then has what it did (guard, felt_relative and so on, methods/guard.py;
regulariser_norm_ratio and so on, edits/regularisers.py).
"""

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from typing import Any

from nbkit.edits.edit import Edit
from nbkit.edits.overlays import unedited
from nbkit.errors import MethodError, NbkitError
from nbkit.keys.solving import SecondMomentLike, SecondMoments
from nbkit.methods.guard import Guard
from nbkit.methods.hparams import hyper_parameters
from nbkit.methods.regularising import regularising
from nbkit.methods.setups import in_words
from nbkit.methods.table import METHODS
from nbkit.methods.verbs import as_templates, edit, needed_moments
from nbkit.models import prompts
from nbkit.models.language_model import LanguageModel
from nbkit.records.bounds import shown
from nbkit.records.provenance import code_version, digest, provenance
from nbkit.records.requests import EditRequest
from nbkit.records.results import Store, Study
from nbkit.studies import metrics as measure

N_PREFIXES = 3  # that a request is asked behind
BEHIND_PREFIXES = (  # metrics of the rewrite prompt, and of its paraphrases
    *("efficacy", "efficacy_argmax", "target_probability", "reliability"),
    *("paraphrase", "paraphrase_argmax", "generalization"),
)


class MethodStudy:
    """What the studies share: the model, the method with all its parameters, and where rows go."""

    def __init__(
        self,
        lm: LanguageModel,
        method: str,
        context_templates,
        second_moment,
        store: Store | None,
        hparams,
        guard: Guard | None = None,
        regularise: Mapping[str, Any] | None = None,
    ):
        regularising(lm, regularise)
        self.lm, self.method, self.hparams = lm, method, hparams
        parameters = hyper_parameters(lm, method, **hparams)  # checks them before any work
        second_moment = needed_moments(lm, method, parameters, second_moment)
        self.moments = None if second_moment is None else SecondMoments.of(second_moment, lm)  # factored once
        self.store = Store() if store is None else store
        self.given_templates = None if context_templates is None else as_templates(lm, context_templates, method)
        self.words = in_words(method, parameters)
        self.parameters = dataclasses.asdict(parameters)
        self.parameters |= {
            "method": method,
            "context_templates": self.given_templates,
            "second_moment": _digest_of(second_moment),
        }
        self.guard = guard
        if isinstance(guard, Guard):  # `edit` refuses what is none
            about = {"most": guard.most, "instead": guard.instead}
            self.parameters["guard"] = about | {"second_moment": _digest_of(guard.second_moment)}
        self.regularise = regularise
        if regularise is not None:
            self.parameters["regularise"] = {
                name: digest(value) if name == "second_moments" else value for name, value in regularise.items()
            }
        read = [path for path in METHODS[method].files(lm, parameters) if path.is_file()]
        if read:
            self.parameters["files"] = [sha256(path.read_bytes()).hexdigest() for path in read]

    def study(self, name: str, data: dict[str, Any], **parameters) -> Study:
        """The stored study of these data and parameters, and those of the method."""
        parameters = {**self.parameters, **parameters}
        hashes = {name: digest(value) for name, value in data.items()}
        key = {"model": self.lm.hash, "dtype": str(self.lm.dtype), "code": code_version()}
        key["unedited"] = self.lm.base_hash  # of which the templates are, whatever edits are in the weights
        key |= {"data": hashes, "parameters": parameters}
        return self.store.study(name, key, provenance(self.lm, data_hash=hashes, parameters=parameters))

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `edit` and `edit_sequence`; context templates are sampled here once, if none are given."""
        return {
            "method": self.method,
            "context_templates": as_templates(self.lm, self.given_templates, self.method),
            "second_moment": self.moments,
            **({} if self.guard is None else {"guard": self.guard}),
            **({} if self.regularise is None else {"regularise": self.regularise}),
            **self.hparams,
        }

    @cached_property
    def unseen_prefixes(self) -> list[str]:
        """What prompts are asked behind: neither the method's own templates nor ROME's, so mostly the same for all.

        The unedited model's, as the templates are.
        """
        seen = {*self.arguments["context_templates"], *as_templates(self.lm, self.given_templates)}
        with unedited(self.lm):
            return prompts.unseen_templates(self.lm, seen)

    def readable(self, perplexity: float) -> float:
        """The unedited model's perplexity as it is given, with a warning where guessing any token would be better."""
        return readable(self.lm, perplexity, stacklevel=4)

    def task(self, what: str) -> str:
        """The name of a progress bar: what is done, with which method, to which model."""
        return f"{self.lm.title}, {self.words}: {what}"

    def edits(self, requests: Sequence[EditRequest]) -> list[Edit]:
        return edit(self.lm, requests, **self.arguments)

    def metrics_of(self, request: EditRequest, reference: dict) -> dict[str, float]:
        """The edit metrics of one request on the model as it is."""
        (row,) = measure.edit_metrics(self.lm, [request], reference).drop(columns="case_id").to_dict("records")
        return row

    def metrics_of_each(
        self, requests: Sequence[EditRequest], made: Sequence[Edit], reference: dict
    ) -> list[dict[str, float]]:
        """The edit metrics of each request on the model with its own edit, `_prefixed` ones too.

        Those ask the rewrite prompt and its paraphrases behind prefixes the edit was not computed with, and are means
        over them.
        """
        frame = measure.edit_metrics(self.lm, requests, reference, edits=made).drop(columns="case_id")
        alone = [dataclasses.replace(r.alone, paraphrase_prompts=r.paraphrase_prompts) for r in requests]
        drawn = [self.prefixes_of(request) for request in requests]
        behind = [
            measure.edit_metrics(self.lm, alone, prefix=prefixes, edits=made, prefix_paraphrases=True)
            for prefixes in zip(*drawn, strict=True)
        ]
        for name in BEHIND_PREFIXES if behind else ():
            frame[f"{name}_prefixed"] = sum(one[name] for one in behind) / len(behind)
        return frame.to_dict("records")

    def prefixes_of(self, request: EditRequest) -> list[str]:
        """The unseen prefixes that a request is asked behind, drawn by its content; all if there are no N_PREFIXES."""
        asked = dataclasses.asdict(request)
        del asked["generation_prompts"]  # which prefixes it is asked behind does not depend on them
        unseen, first = self.unseen_prefixes, int(digest(asked), 16)
        return [unseen[(first + i) % len(unseen)] for i in range(min(N_PREFIXES, len(unseen)))]


def readable(lm: LanguageModel, perplexity: float, stacklevel: int = 2) -> float:
    """The unedited model's perplexity as it is given, with a warning where guessing any token would be better."""
    if not perplexity <= len(lm.tokenizer):
        warnings.warn(
            f"{lm.title} cannot read these texts: its perplexity before any edit is {perplexity:.3g}, and "
            f"guessing among its {len(lm.tokenizer)} tokens would do no worse. What edits do to it says "
            "nothing; take texts and requests of the kind that it was trained on",
            stacklevel=stacklevel,
        )
    return perplexity


def _digest_of(second_moment: SecondMomentLike) -> str | None:
    """The digest of second moments, the same however they are given; None for none."""
    given = second_moment.given if isinstance(second_moment, SecondMoments) else second_moment
    return None if given is None else digest(given)


def singly_where_one_fails(together: Callable[[Sequence[str]], list]) -> Callable[[Sequence[str]], Iterator[list]]:
    """`compute` of `Study.complete_together`, of units that are computed side by side; where that fails, one by one,
    so that one request that cannot be used does not keep the others from being done."""

    def compute(some: Sequence[str]) -> Iterator[list]:
        try:
            done = together(some)
        except NbkitError:
            if len(some) > 1:
                for unit in some:
                    yield together([unit])
            raise
        yield done

    return compute


def check_arguments(name: str, given: Any, function: Callable) -> None:
    """MethodError unless `given` is a dict of arguments that `function` has."""
    known = inspect.signature(function).parameters
    if not isinstance(given, Mapping) or not set(given) <= set(known):
        raise MethodError(f"{name} must be arguments by name, of {', '.join(known)}, not {shown(given)}")


def by_digest(requests: Sequence[EditRequest]) -> dict[str, EditRequest]:
    return {digest(request): request for request in requests}


def described(lm: LanguageModel, request: EditRequest) -> dict[str, Any]:
    about = prompts.request_columns(lm, request)
    return {
        "case_id": about.pop("case_id"),
        "prompt": request.prompt,
        **about,
        "target_new": request.target_new,
        "target_true": request.target_true,
        "relation_id": request.relation_id,
    }


def outcome_columns(made: Edit) -> dict[str, Any]:
    """The numbers and words of an edit's info; its target probability is that of the search for v*, so it says so."""
    row = {"method": made.method}
    row |= {name: value for name, value in made.info.items() if isinstance(value, (str, bool, int, float))}
    losses = made.info.get("losses") or [[float("nan")]]
    row |= {"final_loss": losses[-1][0], "n_steps": len(made.info.get("losses", []))}
    if "target_probability" in row:
        row["optimised_probability"] = row.pop("target_probability")
    return row
