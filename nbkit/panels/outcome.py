"""How an `Outcome` is shown: numbers, answers, texts side by side, figures; and several outcomes beside each other."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nbkit import plots
from nbkit.panels import fragments
from nbkit.studies.one_edit import Outcome

ROWS_IN_WORDS = {
    "efficacy": "new target likelier than the true one",
    "paraphrase": "the same at paraphrases",
    "neighborhood": "neighbours keep their own answer",
    "locality": "neighbours' first choices as before",
}


def numbers(outcome: Outcome) -> dict[str, object]:
    """What is said of an edit in one column: whether it took, what it cost, and what its update is made of."""
    at_prompt, info = outcome.answers.iloc[0], outcome.edit.info
    before, after = (outcome.metrics.loc[when] for when in ("before", "after"))
    found = {
        "target probability, before": at_prompt["probability_before"],
        "target probability, after": at_prompt["probability_after"],
        "rank of its first token, before": at_prompt["rank_before"],
        "rank of its first token, after": at_prompt["rank_after"],
    }
    behind = outcome.answers[outcome.answers["role"] == "behind an unseen prefix"]
    if len(behind):
        found["target probability behind an unseen prefix, after"] = behind.iloc[0]["probability_after"]
    for name, words in ROWS_IN_WORDS.items():
        if not np.isnan(after[name]):
            found[f"{words}, before"], found[f"{words}, after"] = before[name], after[name]
    found |= {f"perplexity, {when}": value for when, value in outcome.perplexity.items()}
    found["perplexity, times what it was"] = outcome.ratio
    found["outcome"] = "collapse" if outcome.collapsed() else "no collapse"
    for name, words in (("numerator", "numerator"), ("signed_denominator", "signed denominator")):
        if name in info:
            found[words] = float(info[name])
    found["‖ΔW‖"] = outcome.edit.norm()
    found["‖ΔW‖ / ‖W‖"] = outcome.edit.norm() / float(np.sqrt((outcome.weights["of_weight"] ** 2).sum()))
    found["seconds of the edit"] = outcome.seconds
    return found


def verdict(outcome: Outcome) -> str:
    """The two sentences above everything else."""
    at_prompt = outcome.answers.iloc[0]
    first = outcome.request.target_new.split()[0]
    took = "is now" if at_prompt["rank_after"] == 1 else "is not"
    said = f"“{first}” {took} the likeliest answer at the prompt (rank {fragments.shown(at_prompt['rank_after'])})."
    how = "The edit breaks the model" if outcome.collapsed() else "The model survives the edit"
    times = fragments.shown(outcome.ratio)
    return f"{how}: perplexity of unrelated text is {times} times what it was. {said}"


def summary(outcome: Outcome) -> str:
    """Verdict, numbers, answers and weights, as HTML."""
    mark = "✖" if outcome.collapsed() else "✔"
    of_numbers = pd.DataFrame({"value": numbers(outcome)}, dtype=object)
    left = fragments.table(of_numbers, "The edit in numbers")
    right = _answers(outcome) + _weights(outcome)
    return (
        f'<p role="status"><b>{mark} {fragments.escape(verdict(outcome))}</b></p>'
        f'<div class="nbkit-sides"><div>{left}</div><div>{right}</div></div>'
    )


def _answers(outcome: Outcome) -> str:
    frame, asked = outcome.answers, []
    for row in frame.to_dict("records"):
        says = [repr(row[f"says_{when}"] or "nothing: its numbers are not finite") for when in ("before", "after")]
        asked.append(
            {
                "prompt": row["prompt"],
                "answer": row["answer"],
                "probability": f"{row['probability_before']:.3f} → {row['probability_after']:.3f}",
                "rank": f"{fragments.shown(row['rank_before'])} → {fragments.shown(row['rank_after'])}",
                "says": f"{says[0]} → {says[1]}",
            }
        )
    shown = pd.DataFrame(asked, index=frame["role"])
    return fragments.table(shown, "What is asked, before → after the edit", words=("prompt", "answer", "says"))


def _weights(outcome: Outcome) -> str:
    named = {"norm": "‖ΔW‖", "of_weight": "‖W‖", "felt": "√E‖ΔWk‖²", "of_output": "√E‖Wk‖²"}
    return fragments.table(
        outcome.weights.set_index("weight").rename(columns=named),
        "What is written into each weight, and what the keys k of ordinary text feel of it",
    )


def texts(outcome: Outcome) -> str:
    """What the model goes on with before and after, side by side, differing words struck out and underlined."""
    rows = []
    for row in outcome.said.to_dict("records"):
        before, after = fragments.differing(row["before"], row["after"])
        prompt = fragments.escape(row["prompt"])
        rows.append(
            f'<tr><th scope="row">{prompt}</th><td class="words">{before}</td><td class="words">{after}</td></tr>'
        )
    return (
        "<table><caption>What the model goes on with, by itself: words that differ are struck out before and underlined"
        ' after</caption><thead><tr><th></th><th class="words">before</th><th class="words">after</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def figure(outcome: Outcome, among: pd.DataFrame | None = None) -> Figure:
    """The search for v* (of methods that have one), the next token before and after, and the key among all keys.

    among: as for `plots.key_among_others`; None for no map.
    """
    losses, target = outcome.edit.info.get("losses"), outcome.request.target_new
    searched = bool(losses) and len(np.shape(losses)) == 2 and np.shape(losses)[1] == 4
    n_panels = 1 + searched + (among is not None)
    with plots.paper_style():
        drawn = Figure(figsize=(2.9 * n_panels, 2.7), layout="constrained")
        axes = iter(np.atleast_1d(drawn.subplots(1, n_panels)))
        if searched:
            frame = pd.DataFrame(losses, columns=["total", "nll", "kl", "weight_decay"])
            plots.loss_curve(
                frame.rename_axis("step").reset_index(), next(axes), outcome.edit.hparams.get("early_stop_loss")
            )
        first = next(
            (token for token in outcome.next_tokens["token"] if token.strip() and target.startswith(token.strip())),
            None,
        )
        plots.top_tokens(outcome.next_tokens, next(axes), first)
        if among is not None:
            plots.key_among_others(among, next(axes))
    return drawn


def compared(outcomes: Mapping[str, Outcome]) -> str:
    """Several outcomes, a column each, and what they say at the first prompt."""
    frame = pd.DataFrame({name: pd.Series(numbers(outcome), dtype=object) for name, outcome in outcomes.items()})
    said = pd.DataFrame(
        {name: outcome.said.set_index("prompt")["after"] for name, outcome in outcomes.items()}, dtype=object
    )
    request = {name: f"{outcome.request.text} → {outcome.request.target_new}" for name, outcome in outcomes.items()}
    order = next(iter({tuple(numbers(outcome)): None for outcome in outcomes.values()}))
    frame = frame.loc[[*order, *(row for row in frame.index if row not in order)]]
    about = pd.DataFrame([request], index=["request"], dtype=object)
    return fragments.table(
        pd.concat([about, frame.astype(object).where(frame.notna(), "–")]), "Pinned edits", words=tuple(outcomes)
    ) + fragments.table(said.where(said.notna(), "–"), "What the edited model goes on with", words=tuple(outcomes))
