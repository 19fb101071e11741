"""How an `Outcome` is shown: numbers, answers, texts side by side, figures; and several outcomes beside each other."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nbkit import plots
from nbkit.panels import fragments
from nbkit.studies.one_edit import Outcome

ALT = "losses of the search for v*, next tokens before and after, and the key among those of other requests"
ROWS_IN_WORDS = {
    "efficacy": "new target likelier than the true one",
    "paraphrase": "the same at paraphrases",
    "neighborhood": "neighbours keep their own answer",
    "locality": "neighbours' first choices as before",
}


def numbers(outcome: Outcome) -> dict[str, object]:
    """What is said of an edit in one column: whether it took, what it cost, what its update is made of. A pair is the
    number before the edit and the one after it."""
    at_prompt, info = outcome.answers.iloc[0], outcome.edit.info
    before, after = (outcome.metrics.loc[when] for when in ("before", "after"))
    found: dict[str, object] = {
        "target probability": (at_prompt["probability_before"], at_prompt["probability_after"]),
        "rank of its first token": (at_prompt["rank_before"], at_prompt["rank_after"]),
    }
    behind = outcome.answers[outcome.answers["role"] == "behind an unseen prefix"]
    if len(behind):
        first = behind.iloc[0]
        found["target probability behind an unseen prefix"] = first["probability_before"], first["probability_after"]
    for name, words in ROWS_IN_WORDS.items():
        if not np.isnan(after[name]):
            found[words] = before[name], after[name]
    if outcome.n_before:
        found["perplexity of the unedited model"] = outcome.perplexity["unedited"]
    found["perplexity"] = outcome.perplexity["before"], outcome.perplexity["after"]
    found["perplexity, times what it was"] = outcome.ratio
    found["outcome"] = "collapse" if outcome.collapsed() else "no collapse"
    for name, words in (("numerator", "numerator"), ("signed_denominator", "signed denominator")):
        if name in info:
            found[words] = float(info[name])
    found["‖ΔW‖"] = outcome.edit.norm()
    found["‖ΔW‖ / ‖W‖"] = outcome.edit.norm() / float(np.sqrt((outcome.weights["of_weight"] ** 2).sum()))
    found["seconds of the edit"] = outcome.seconds
    return found


def _column(outcome: Outcome) -> pd.Series:
    """The numbers as texts."""
    found = numbers(outcome)
    pairs = {
        name: " → ".join(map(fragments.shown, value)) if isinstance(value, tuple) else fragments.shown(value)
        for name, value in found.items()
    }
    return pd.Series(pairs, dtype=object)


def verdict(outcome: Outcome) -> str:
    """The two sentences above everything else."""
    at_prompt = outcome.answers.iloc[0]
    first = outcome.request.target_new.split()[0]
    took = "is now" if at_prompt["rank_after"] == 1 else "is not"
    said = f"“{first}” {took} the likeliest answer at the prompt (rank {fragments.shown(at_prompt['rank_after'])})."
    how = "The edit breaks the model" if outcome.collapsed() else "The model survives the edit"
    times = fragments.shown(outcome.ratio)
    return f"{how}: perplexity of unrelated text is {times} times what it was. {said}"


def shown(outcome: Outcome, among: pd.DataFrame | None = None) -> str:
    """All of it as HTML. among: as for `figure`."""
    mark = "✖" if outcome.collapsed() else "✔"
    of_numbers = _column(outcome).to_frame("before → after, or value")
    beside = fragments.figure(figure(outcome, among), ALT)
    return (
        f'<p role="status"><b>{mark} {fragments.escape(verdict(outcome))}</b></p><div class="nbkit-sides"><div>'
        f"{fragments.table(of_numbers, 'The edit in numbers')}</div><div>{beside}</div></div>"
        f"{_answers(outcome)}{_texts(outcome)}{_weights(outcome)}"
    )


def _answers(outcome: Outcome) -> str:
    frame, asked = outcome.answers, []
    for row in frame.to_dict("records"):
        says = [_said(row[f"says_{when}"]) for when in ("before", "after")]
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


def _said(token: str | None) -> str:
    """The likeliest token; one of space alone with its quotes."""
    return "nothing: no finite numbers" if token is None else token.strip() or repr(token)


def _weights(outcome: Outcome) -> str:
    named = {"norm": "‖ΔW‖", "of_weight": "‖W‖", "felt": "√E‖ΔWk‖²", "of_output": "√E‖Wk‖²"}
    return fragments.table(
        outcome.weights.set_index("weight").rename(columns=named),
        "What is written into each weight, and what the keys k of ordinary text feel of it",
    )


def _texts(outcome: Outcome) -> str:
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
    losses = outcome.edit.info.get("losses")
    searched = bool(losses) and len(np.shape(losses)) == 2 and np.shape(losses)[1] == 4
    heights = [2.0] * searched + [2.3] + [2.6] * (among is not None)
    with plots.paper_style():
        drawn = Figure(figsize=(4.0, sum(heights)), layout="constrained")
        axes = iter(np.atleast_1d(drawn.subplots(len(heights), height_ratios=heights)))
        if searched:
            frame = pd.DataFrame(losses, columns=["total", "nll", "kl", "weight_decay"])
            plots.loss_curve(
                frame.rename_axis("step").reset_index(), next(axes), outcome.edit.hparams.get("early_stop_loss")
            )
        [first] = outcome.next_tokens.loc[outcome.next_tokens["of_target"], "token"]
        plots.top_tokens(outcome.next_tokens, next(axes), first)
        if among is not None:
            plots.key_among_others(among, next(axes))
    return drawn


def compared(outcomes: Mapping[str, Outcome]) -> str:
    """Several outcomes, a column each, and what they go on with at each prompt."""
    columns = {name: _column(outcome) for name, outcome in outcomes.items()}
    rows = list(dict.fromkeys(row for column in columns.values() for row in column.index))
    frame = pd.DataFrame({name: column.reindex(rows, fill_value="–") for name, column in columns.items()})
    asked = {name: f"{outcome.request.text} → {outcome.request.target_new}" for name, outcome in outcomes.items()}
    frame = pd.concat([pd.DataFrame([asked], index=["request"]), frame])
    said = [dict(zip(outcome.said["prompt"], outcome.said["after"], strict=True)) for outcome in outcomes.values()]
    prompts = list(dict.fromkeys(prompt for one in said for prompt in one))
    texts = {name: [one.get(prompt, "–") for prompt in prompts] for name, one in zip(outcomes, said, strict=True)}
    going_on = fragments.table(
        pd.DataFrame(texts, index=prompts), "What the edited model goes on with", words=tuple(outcomes)
    )
    return fragments.table(frame, "Pinned edits: before → after, or value") + going_on
