"""What the card of an embedded model reports: what it knows, how its first position behaves, where edits break it."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from miniworld.spans import MASK
from miniworld.world import World
from nbkit.edits.edit import Edit
from nbkit.keys.extract import keys, token_keys
from nbkit.keys.moments import second_moment
from nbkit.models.language_model import LanguageModel
from nbkit.models.memory import by_cost, in_order
from nbkit.models.prompts import context_templates, pad, subject_kind, target_ids, tokenize
from nbkit.records.bars import steps
from nbkit.records.collapse import ratios
from nbkit.records.requests import EditRequest
from nbkit.studies.metrics import edit_metrics, score_targets
from nbkit.studies.single import single_edits

SENTENCE = "There was a new lamp near the market. "  # before a prompt, as in running text
UNSEEN = ("The old bridge in the park was quiet. {}", "They carried a chair from the kitchen, but it was heavy. {}")
LATER = 8  # a position that is no longer near the first; queries before it have little else to attend to


def recall(lm: LanguageModel, world: World, before: str = "", batch_size: int = 256, every: int = 1) -> pd.DataFrame:
    """Whether the model's first choice after each template of each fact is its object, behind the text `before`.

    One row a fact and template: relation_id, template, subject_kind, correct. Of the facts, one in `every` is asked. An
    encoder-decoder is asked to fill in what follows: see `filled_in`.
    """
    subjects = list(world.facts_about())
    ids_of = lm.tokenizer(subjects, add_special_tokens=False).input_ids
    single = {subject for subject, ids in zip(subjects, ids_of, strict=True) if len(ids) == 1}
    rows, prompts, targets = [], [], []
    for fact in world.facts[::every]:
        for number, template in enumerate(fact.relation.templates):
            kind = "one-token first" if fact.subject in single else "several-token first"
            kind = kind if template.startswith("{}") else "later"
            rows.append({"relation_id": fact.relation.relation_id, "template": number, "subject_kind": kind})
            prompts.append(before + template.replace("{}", fact.subject))
            targets.append(fact.object)
    if lm.architecture.side:
        return pd.DataFrame(rows).assign(correct=filled_in(lm, prompts, targets, batch_size))
    return pd.DataFrame(rows).assign(correct=score_targets(lm, prompts, targets, batch_size)["correct"])


@torch.no_grad()
def filled_in(lm: LanguageModel, prompts: Sequence[str], targets: Sequence[str], batch_size: int) -> list[bool]:
    """Whether each target is what an encoder-decoder puts after a prompt, every token of it its first choice.

    The encoder reads the prompt, a mask and a full stop, and the decoder, which has written the prompt, goes on, as
    both were trained to (spans.py). lm: the encoder's side, whose tokenizer writes texts as the encoder reads them.
    """
    written = lm.tokenizer(list(prompts), add_special_tokens=False).input_ids
    wanted = [target_ids(lm, target) for target in targets]
    read = tokenize(lm, [f"{prompt}{MASK}." for prompt in prompts])

    def compute(places: Sequence[int]) -> list[bool]:
        texts = pad(lm, [read[place] for place in places])
        asked = pad(lm, [written[place] + wanted[place] for place in places])
        logits = lm.model(
            input_ids=texts.input_ids, attention_mask=texts.attention_mask, labels=asked.input_ids, use_cache=False
        ).logits
        said = (choice[len(written[place]) :] for place, choice in zip(places, logits.argmax(-1).tolist(), strict=True))
        return [choice[: len(wanted[place])] == wanted[place] for place, choice in zip(places, said, strict=True)]

    return in_order(by_cost([len(row) for row in read], batch_size, compute))


def first_token_regime(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    texts: Sequence[str],
    n: int = 100,
    layers: Sequence[int] | None = None,
    templates: Sequence[str] | None = None,
) -> pd.DataFrame:
    """How the keys of the first position differ from others, one row a layer, from `n` requests of each kind and texts.

    Columns, the similarities being medians of cosines: position_0 and position_8, between different texts at one
    position; one_token_first and several_token_first, between a subject's key in the plain prompt and behind each
    prefix; ratio, the median of (k_u · k̄)/(k̄ · k̄) of one-token first subjects, and negative, the share of them
    whose ratio is; norm_plain and norm_prefixed, their median key norms; attention_0, the mean attention on position 0,
    over heads and queries from position 8 on, which is not measured on a side of an encoder-decoder.

    layers: None takes all. templates: the plain one first; None samples them with seed 0, where the model can.
    """
    kinds = [subject_kind(lm, request) for request in requests]
    groups = {kind: [r for r, k in zip(requests, kinds, strict=True) if k == kind][:n] for kind in set(kinds)}
    templates = context_templates(lm, seed=0) if templates is None else templates
    attention = None if lm.architecture.side else attention_on_first(lm, texts[:n])
    long = [text for text, row in zip(texts, tokenize(lm, texts), strict=True) if len(row) > LATER][:n]
    rows = []
    for layer in range(lm.n_layers) if layers is None else layers:
        by_token = token_keys(lm, long, layer)
        one = keys(lm, groups["one-token first"], layer, templates)  # (request, template, d_mlp)
        several = keys(lm, groups["several-token first"], layer, templates)
        mean = one.mean(1)
        ratios = (one[:, 0] * mean).sum(-1) / (mean * mean).sum(-1)
        row = {
            "layer": layer,
            "position_0": _pairwise_median(torch.stack([of_text[0] for of_text in by_token])),
            f"position_{LATER}": _pairwise_median(torch.stack([of_text[LATER] for of_text in by_token])),
            "one_token_first": torch.cosine_similarity(one[:, :1], one[:, 1:], dim=-1).median().item(),
            "several_token_first": torch.cosine_similarity(several[:, :1], several[:, 1:], dim=-1).median().item(),
            "ratio": ratios.median().item(),
            "negative": (ratios < 0).double().mean().item(),
            "norm_plain": one[:, 0].norm(dim=-1).median().item(),
            "norm_prefixed": one[:, 1:].norm(dim=-1).median().item(),
        }
        if attention is not None:
            row["attention_0"] = attention[layer]
        rows.append(row)
    return pd.DataFrame(rows)


def _pairwise_median(vectors: torch.Tensor) -> float:
    """Median cosine over all pairs of rows."""
    unit = torch.nn.functional.normalize(vectors, dim=-1)
    upper = torch.triu_indices(len(unit), len(unit), 1)
    return float(np.median((unit @ unit.T)[upper[0], upper[1]].cpu().numpy()))


@torch.no_grad()
def attention_on_first(lm: LanguageModel, texts: Sequence[str]) -> list[float]:
    """Mean attention weight on position 0 by layer, over texts, heads and queries from position 8 on."""
    implementation = lm.model.config._attn_implementation
    lm.model.set_attn_implementation("eager")  # the only one that returns its weights
    try:
        batch = pad(lm, tokenize(lm, texts))
        output = lm.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_attentions=True, use_cache=False
        )
    finally:
        lm.model.set_attn_implementation(implementation)
    counted = batch.attention_mask.bool() & (torch.arange(batch.shape[1], device=lm.device) >= LATER)
    return [weights[..., 0].mean(1)[counted].mean().item() for weights in output.attentions]  # (row, head, query, key)


def said(lm: LanguageModel, requests: Sequence[EditRequest], edits: Sequence[Edit]) -> pd.DataFrame:
    """Whether the new target is the edited model's first choice, one row an edit, each edit on its own.

    plain: at the plain prompt. behind: the share of the sentences of UNSEEN behind which it is.
    """
    plain, *behind = (
        edit_metrics(lm, requests, prefix=prefix, edits=edits)["efficacy_argmax"] for prefix in ("{}", *UNSEEN)
    )
    return pd.DataFrame({"plain": plain, "behind": np.mean(behind, axis=0)})


def edit_sweep(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    texts: Sequence[str],
    corpus: Sequence[str],
    layers: Sequence[int],
    n: int,
) -> pd.DataFrame:
    """ROME with and without C, and C-ROME without, on the first `n` requests of each kind of subject, layer by layer.

    The rows of `studies.single_edits`, with a column `setting`.
    """
    kinds = pd.Series([subject_kind(lm, request) for request in requests])
    chosen = [requests[index] for _, group in kinds.groupby(kinds) for index in group.index[:n]]
    frames = []
    for layer in steps(layers, f"{lm.title}: edit sweep", "layer"):
        settings = {
            "ROME": {},
            "ROME with C": {"second_moment": second_moment(lm, layer, corpus)},
            "C-ROME": {"key_mode": "prefixed"},
        }
        frames += [
            single_edits(lm, chosen, texts, layer=layer, **arguments).assign(setting=setting)
            for setting, arguments in settings.items()
        ]
    return pd.concat(frames, ignore_index=True)


def sweep_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The sweep in brief: by setting, layer and kind of subject, how far perplexity rose and whether the edit took.

    Ratios are of perplexity after to before; a NaN or infinite one counts as more than hundredfold.
    """
    rows = rows.assign(ratio=ratios(rows))
    groups = rows.groupby(["setting", "layer", "subject_kind"])
    return groups.agg(
        n=("ratio", "size"),
        median_ratio=("ratio", "median"),
        largest_ratio=("ratio", "max"),
        tenfold=("ratio", lambda ratio: (~(ratio <= 10)).mean()),
        hundredfold=("ratio", lambda ratio: (~(ratio <= 100)).mean()),
        under_10_percent=("ratio", lambda ratio: (ratio < 1.1).mean()),
        efficacy=("efficacy", "mean"),
        first_choice=("efficacy_argmax", "mean"),
        first_choice_prefixed=("efficacy_argmax_prefixed", "mean"),
        denominator=("denominator", "median"),
    ).reset_index()
