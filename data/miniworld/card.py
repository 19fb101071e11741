"""Writes the model card of an embedded model. Every number in it is measured when it is written.

The edit sweep takes most of the time; its rows are stored like those of any study, so it can be interrupted.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

import pandas as pd

from miniworld.efficacy import TAKEN, TOLERANCE, chosen, efficacy_sweep, unreported_requests
from miniworld.families import FAMILIES
from miniworld.measures import SENTENCE, UNSEEN, edit_sweep, first_token_regime, recall, sweep_table
from miniworld.train import CHECKPOINT_EVERY
from miniworld.world import World
from nbkit.architectures import Side
from nbkit.methods.hparams import hyper_parameters
from nbkit.models.language_model import LanguageModel
from nbkit.records.requests import EditRequest
from nbkit.studies.metrics import perplexity
from nbkit.studies.task_scores import task_scores

HERE = Path(__file__).parent
N_TEXTS = 50  # for the perplexity of each edited model, as in ME-PPL_50


def filled(template: str, **fields: str | float) -> str:
    """A template of this directory, filled in."""
    return Template((HERE / template).read_text(encoding="utf-8")).substitute(fields)


def markdown(frame: pd.DataFrame) -> str:
    """A frame as a Markdown table, floats with three significant digits."""
    cells = [[f"{c:.3g}" if isinstance(c, float) else str(c) for c in row] for row in frame.itertuples(index=False)]
    lines = [list(map(str, frame.columns)), ["---"] * len(frame.columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def task_table(lm: LanguageModel) -> pd.DataFrame:
    """Task scores with their 95 % interval (1.96 standard errors) and its distance from chance."""
    scores = task_scores(lm)
    low, high = scores["score"] - 1.96 * scores["stderr"], scores["score"] + 1.96 * scores["stderr"]
    return scores.drop(columns="stderr").assign(low=low, high=high.clip(upper=1), above_chance=low - scores["chance"])


def made(lm: LanguageModel, world: World, folder: Path) -> str:
    """The opening of a card: what the model in `folder` is, and how it was trained."""
    recipe = json.loads((folder / "recipe.json").read_text())
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    family = FAMILIES[recipe["family"]]
    written = family.text.replace("$A", "text")
    return filled(
        "card_made.md",
        name=folder.name,
        n_facts=f"{len(world.facts):,}",
        entities=", ".join(f"{len(names)} {kind} names" for kind, names in world.subjects.items()),
        family=family.title,
        objective=family.objective,
        n_layers=recipe["n_layers"],
        d_model=recipe["d_model"],
        n_parameters=f"{sum(weight.numel() for weight in lm.model.parameters()):,}",
        megabytes=f"{(folder / 'model.safetensors').stat().st_size / 1e6:.1f}",
        vocabulary=f"{len(lm.tokenizer):,}",
        writes="adds none to a text" if family.text == "$A" else f"writes a text as `{written}`",
        n_tokens=f"{log[-1]['tokens']:,}",
        n_steps=f"{log[-1]['step']:,}",
        device=log[-1]["device"].upper(),
        loss=f"{log[-1]['loss']:.3f}",
        window=recipe["window"],
        opening=f"{recipe['opening']:.0%}",
        random_first=f"{recipe['random_first']:.0%}",
        rumours=f"{recipe['rumours']:.0%}",
        decay=f"{recipe['decay']:.0%}",
        averaged=f"{recipe['averaged']:.0%}",
        every=CHECKPOINT_EVERY,
    )


def recalled(lm: LanguageModel, world: World) -> dict[str, str]:
    """The fields of a card that say what the model knows of the world's facts."""
    rows = recall(lm, world).assign(behind_a_sentence=recall(lm, world, SENTENCE)["correct"])

    def by(column: str) -> str:
        groups = rows.groupby(column)
        means = groups[["correct", "behind_a_sentence"]].mean().set_axis(["prompt_alone", "behind_a_sentence"], axis=1)
        return markdown(means.assign(n=groups.size()).reset_index())

    return {
        "recall_alone": f"{rows['correct'].mean():.4f}",
        "recall_behind": f"{rows['behind_a_sentence'].mean():.4f}",
        "sentence": SENTENCE.strip(),
        "n_recall": f"{len(rows):,}",
        "recall_by_kind": by("subject_kind"),
        "recall_by_relation": by("relation_id"),
    }


def write_card(
    lm: LanguageModel,
    world: World,
    requests: Sequence[EditRequest],
    texts: Sequence[str],
    corpus: Sequence[str],
    folder: Path,
    n_sweep: int = 30,
    n_efficacy: int = 30,
) -> None:
    """Measure the decoder in `folder` and write its `README.md` there.

    texts: held out, for perplexity. corpus: for second moments. n_sweep: requests of each kind of subject, per layer.
    n_efficacy: facts of each of two kinds, for the choice of layer and settings.
    """
    swept = sweep_table(edit_sweep(lm, requests, texts[:N_TEXTS], corpus, range(lm.n_layers - 1), n_sweep))
    efficacy = efficacy_sweep(lm, unreported_requests(lm, n_efficacy))
    best = chosen(efficacy)
    text = filled(
        "card.md",
        made=made(lm, world, folder),
        **recalled(lm, world),
        n_efficacy=efficacy["n"].iloc[0],
        taken=f"{TAKEN:.0%}",
        tolerance=f"{TOLERANCE:g}",
        chosen_layer=f"{best['layer']:.0f}",
        chosen_decay=f"{best['v_weight_decay']:g}",
        chosen_clamp=f"{best['clamp_norm_factor']:g}",
        chosen_steps=f"{best['v_num_grad_steps']:.0f}",
        efficacy=markdown(efficacy),
        n_texts=len(texts),
        sentence_perplexity=f"{perplexity(lm, texts):.3f}",
        token_perplexity=f"{perplexity(lm, texts, kind='token'):.3f}",
        tasks=markdown(task_table(lm)),
        regime=markdown(first_token_regime(lm, requests, texts)),
        n_sweep=n_sweep,
        n_sweep_texts=N_TEXTS,
        ridge=f"{hyper_parameters(lm, 'rome').second_moment_ridge:g}",
        rome=markdown(swept[swept["setting"] == "ROME"].drop(columns="setting")),
        rome_with_c=markdown(swept[swept["setting"] == "ROME with C"].drop(columns="setting")),
        c_rome=markdown(swept[swept["setting"] == "C-ROME"].drop(columns="setting")),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def write_card_of_keys(
    sides: Mapping[Side, LanguageModel],
    world: World,
    requests: Sequence[EditRequest],
    texts: Sequence[str],
    folder: Path,
) -> None:
    """Measure the encoder-decoder in `folder`, of which keys are read and nothing is edited, and write its card."""
    prefixes = (f"{SENTENCE}{{}}", *UNSEEN)
    regimes = {side: markdown(first_token_regime(lm, requests, texts, templates=("{}", *prefixes)))
               for side, lm in sides.items()}  # fmt: skip
    text = filled(
        "card_of_keys.md",
        made=made(sides["encoder"], world, folder),
        **recalled(sides["encoder"], world),
        **regimes,
        prefixes=", ".join(f"“{prefix.removesuffix(' {}')}”" for prefix in prefixes),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
