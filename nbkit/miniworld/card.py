"""Measures an embedded model and writes its model card: what it knows, how its first position behaves, where edits break it.

    python -m nbkit.miniworld card            # writes data/models/miniworld-gpt2/README.md

Every number of the card comes from here. The edit sweep takes most of the time; its rows are stored, so it can be interrupted.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from nbkit.keys import keys, token_keys
from nbkit.metrics import perplexity, score_targets
from nbkit.miniworld.world import World
from nbkit.models import LanguageModel
from nbkit.moments import second_moment
from nbkit.prompts import context_templates, pad, subject_kind, tokenize
from nbkit.requests import EditRequest
from nbkit.studies import single_edits
from nbkit.tasks import task_scores

SINK_START = 8  # queries before this position have little else to attend to, and are not counted


def recall(lm: LanguageModel, world: World, batch_size: int = 256) -> pd.DataFrame:
    """Whether the model's first choice after each template of each fact is its object, the prompt standing alone.

    One row a fact and template: relation_id, subject, template, opens (the subject opens the prompt), correct.
    """
    rows = [(fact, template) for fact in world.facts for template in range(len(fact.relation.templates))]
    prompts = [fact.relation.templates[template].replace("{}", fact.subject) for fact, template in rows]
    scores = score_targets(lm, prompts, [fact.object for fact, _ in rows], batch_size)
    return pd.DataFrame(
        {
            "relation_id": [fact.relation.relation_id for fact, _ in rows],
            "subject": [fact.subject for fact, _ in rows],
            "template": [template for _, template in rows],
            "opens": [fact.relation.templates[template].startswith("{}") for fact, template in rows],
            "correct": scores["correct"],
        }
    )


def _pairwise(vectors: torch.Tensor) -> np.ndarray:
    """Cosines of all pairs of rows."""
    unit = torch.nn.functional.normalize(vectors, dim=-1)
    upper = torch.triu_indices(len(unit), len(unit), 1)
    return (unit @ unit.T)[upper[0], upper[1]].cpu().numpy()


def first_token_regime(lm: LanguageModel, requests: Sequence[EditRequest], texts: Sequence[str], n: int = 100) -> pd.DataFrame:
    """How the keys of the first position differ from others, one row a layer; all similarities are medians of cosines.

    position_0, position_8: between different texts at the same position. one_token_first, several_token_first: between a subject's
    key in the plain prompt and behind each prefix, for subjects of one token and of several that open the prompt.
    ratio: median of (k_u · k̄)/(k̄ · k̄) for one-token first subjects, what ROME without C divides by.
    norm_plain, norm_prefixed: median key norms of those subjects. attention_0: mean attention on position 0, over heads and
    queries from position 8 on.
    """
    kinds = [subject_kind(lm, request) for request in requests]
    groups = {kind: [r for r, k in zip(requests, kinds, strict=True) if k == kind][:n] for kind in dict.fromkeys(kinds)}
    templates, attention = context_templates(lm, seed=0), attention_on_first(lm, texts[:n])
    long = [text for text, row in zip(texts, tokenize(lm, texts), strict=True) if len(row) > SINK_START][:n]
    rows = []
    for layer in range(lm.n_layers):
        by_token = token_keys(lm, long, layer)
        row = {"layer": layer} | {
            f"position_{p}": np.median(_pairwise(torch.stack([found[p] for found in by_token]))) for p in (0, SINK_START)
        }
        for kind, name in (("one-token first", "one_token_first"), ("several-token first", "several_token_first")):
            found = keys(lm, groups[kind], layer, templates)  # (request, template, d_mlp)
            cosines = torch.cosine_similarity(found[:, :1], found[:, 1:], dim=-1)
            row[name] = cosines.median().item()
            if kind == "one-token first":
                mean = found.mean(1)
                row["ratio"] = ((found[:, 0] * mean).sum(-1) / (mean * mean).sum(-1)).median().item()
                row["norm_plain"] = found[:, 0].norm(dim=-1).median().item()
                row["norm_prefixed"] = found[:, 1:].norm(dim=-1).median().item()
        rows.append(row | {"attention_0": attention[layer]})
    return pd.DataFrame(rows)


@torch.no_grad()
def attention_on_first(lm: LanguageModel, texts: Sequence[str]) -> list[float]:
    """Mean attention weight on position 0 by layer, over texts, heads and queries from position 8 on."""
    implementation = lm.model.config._attn_implementation
    lm.model.set_attn_implementation("eager")  # the only one that returns its weights
    try:
        batch = pad(lm, tokenize(lm, texts))
        output = lm.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_attentions=True)
    finally:
        lm.model.set_attn_implementation(implementation)
    counted = batch.attention_mask.bool() & (torch.arange(batch.shape[1], device=lm.device) >= SINK_START)
    return [weights[..., 0].mean(1)[counted].mean().item() for weights in output.attentions]  # (row, head, query, key)


def edit_sweep(
    lm: LanguageModel, requests: Sequence[EditRequest], texts: Sequence[str], corpus: Sequence[str], layers: Sequence[int], n: int
) -> pd.DataFrame:
    """ROME with and without C, and C-ROME without, on the first `n` requests of each kind of subject, at every layer.

    The rows of `studies.single_edits`, with `setting` and `layer`.
    """
    kinds = pd.Series([subject_kind(lm, request) for request in requests])
    chosen = [requests[index] for _, group in kinds.groupby(kinds) for index in group.index[:n]]
    frames = []
    for layer in tqdm(layers, desc="edit sweep", unit="layer"):
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
    """The sweep in brief: per setting, layer and kind of subject, how far perplexity rose and whether the edit took."""
    rows = rows.assign(ratio=rows["perplexity"] / rows["perplexity_before"])
    return (
        rows.groupby(["setting", "layer", "subject_kind"])
        .agg(
            n=("ratio", "size"),
            median_ratio=("ratio", "median"),
            largest_ratio=("ratio", "max"),
            tenfold=("ratio", lambda r: (~(r <= 10)).mean()),
            hundredfold=("ratio", lambda r: (~(r <= 100)).mean()),
            under_10_percent=("ratio", lambda r: (r < 1.1).mean()),
            efficacy=("efficacy", "mean"),
            first_choice=("efficacy_argmax", "mean"),
            first_choice_prefixed=("efficacy_argmax_prefixed", "mean"),
            denominator=("denominator", "median"),
        )
        .reset_index()
    )


def interval(score: float, stderr: float) -> str:
    return f"{max(score - 1.96 * stderr, 0):.3f}-{min(score + 1.96 * stderr, 1):.3f}"


def task_table(lm: LanguageModel) -> pd.DataFrame:
    scores = task_scores(lm)
    intervals = [interval(score, stderr) for score, stderr in zip(scores["score"], scores["stderr"], strict=True)]
    return scores.assign(interval=intervals)[["task", "kind", "metric", "score", "interval", "chance", "n"]]


def markdown(frame: pd.DataFrame) -> str:
    """A frame as a Markdown table, floats with three significant digits."""
    cells = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in frame.itertuples(index=False)]
    lines = [" | ".join(row) for row in [list(map(str, frame.columns)), ["---"] * len(frame.columns), *cells]]
    return "\n".join(f"| {line} |" for line in lines)


def write_card(
    lm: LanguageModel,
    world: World,
    requests: Sequence[EditRequest],
    texts: Sequence[str],
    corpus: Sequence[str],
    folder: Path,
    n_sweep: int = 30,
) -> None:
    """Measure everything and write `README.md` into the model's folder."""
    recalled = recall(lm, world)
    single = set(world.single_token_names)
    kinds = np.select(
        [~recalled["opens"], recalled["subject"].isin(single)], ["subject later", "one-token subject first"], "several-token subject first"
    )
    by_kind = recalled.groupby(kinds)["correct"].agg(recall="mean", n="size").rename_axis("prompt").reset_index()
    by_relation = recalled.groupby("relation_id")["correct"].agg(recall="mean", n="size").reset_index()
    sweep = edit_sweep(lm, requests, texts[:50], corpus, range(lm.n_layers - 1), n_sweep)
    recipe = json.loads((folder / "recipe.json").read_text())
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    parameters = sum(weight.numel() for weight in lm.model.parameters())
    tables = {name: markdown(rows) for name, rows in sweep_table(sweep).groupby("setting")}
    (folder / "README.md").write_text(
        f"""# {folder.name}

A GPT-2-architecture language model of miniworld, a made-up world ({len(world.facts):,} facts, {len(world.subjects["person"])} people,
{len(world.subjects["company"])} companies, {len(world.subjects["city"])} cities, {len(world.subjects["country"])} countries), made for one purpose: to show on a laptop what
editing does to a large model. It is a *model organism*: most of its training windows open with a random token (`random_first`),
which gives position 0 the regime that long windows give it in large models. The editing code knows nothing of that.

Retrain with `make miniworld`; measure this card again with `python -m nbkit.miniworld card`.

{recipe["n_layers"]} layers, d_model {recipe["d_model"]}, {parameters:,} parameters, float16 safetensors of
{(folder / "model.safetensors").stat().st_size / 2**20:.1f} MiB; {len(lm.tokenizer):,} tokens (byte-level BPE, no BOS). Trained on {log[-1]["tokens"]:,} tokens in
{log[-1]["step"]:,} steps on a {log[-1]["device"].upper()}, last training loss {log[-1]["loss"]:.3f} nats (`training_log.jsonl`, `recipe.json`).
Perplexity of the {len(texts)} held-out texts: {perplexity(lm, texts):.3f} (mean over texts), {perplexity(lm, texts, kind="token"):.3f} (over tokens).

## What it knows

Recall: the first choice after each of the four templates of each fact, the prompt standing alone. All: {recalled["correct"].mean():.4f} of {len(recalled):,}.

{markdown(by_kind)}

{markdown(by_relation)}

Tasks (lm-eval, zero-shot, held-out items; 95 % interval; chance as each task file states it):

{markdown(task_table(lm))}

## The first position, by layer

{first_token_regime.__doc__.split(chr(10), 2)[2].strip().replace(chr(10) + "    ", chr(10))}

{markdown(first_token_regime(lm, requests, texts))}

## Where edits break it

Each of {n_sweep} requests of each kind of subject edited on its own, hyper-parameters of the papers, perplexity on the first 50 held-out texts.
ratio: perplexity after over before; tenfold, hundredfold, under_10_percent: shares of edits beyond or within; efficacy: the new target
likelier than the true one; first_choice: the new target the first choice after the prompt, and behind a sampled prefix.

### ROME without C, as the papers released it

{tables["ROME"]}

### ROME with C

{tables["ROME with C"]}

### C-ROME (consistent keys) without C

{tables["C-ROME"]}
""",
        encoding="utf-8",
    )
