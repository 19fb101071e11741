"""How far what ordinary text feels of an update foretells the perplexity of the edited model: measured, by method.

The edits are of facts that no notebook reports (efficacy.py), each by itself, with the defaults of the model; the
second moments are of its training text, the perplexities of held-out text.
"""

from collections.abc import Sequence

import pandas as pd

from nbkit.methods.hparams import hyper_parameters
from nbkit.methods.table import METHODS
from nbkit.methods.verbs import edit
from nbkit.models.language_model import LanguageModel
from nbkit.records.bars import steps
from nbkit.records.calibration import calibration, threshold
from nbkit.records.collapse import ratios
from nbkit.records.requests import EditRequest
from nbkit.studies.damage import damage
from nbkit.studies.metrics import perplexity

SETTINGS = ("rome/mixed", "rome/prefixed", "rome/plain", "ft", "memit", "alphaedit", "mend", "kn")
RISES = (1.5, 10.0)  # how many times the perplexity before the edit


def settings_of(lm: LanguageModel) -> list[str]:
    """SETTINGS without the methods that were not trained for the model: MEND's files are not there."""
    methods = {setting: setting.partition("/")[0] for setting in SETTINGS}
    files = {one: METHODS[method].files(lm, hyper_parameters(lm, method)) for one, method in methods.items()}
    return [setting for setting in SETTINGS if all(path.is_file() for path in files[setting])]


def damages(
    lm: LanguageModel, requests: Sequence[EditRequest], texts: Sequence[str], settings: Sequence[str]
) -> pd.DataFrame:
    """The rows of `nbkit.damage` with setting ("rome/mixed": method and key_mode), perplexity, perplexity_before."""
    before, frames = perplexity(lm, texts), []
    for setting in steps(settings, f"{lm.title}: damage", "setting"):
        method, _, key_mode = setting.partition("/")
        edits = edit(lm, requests, method, progress=False, **({"key_mode": key_mode} if key_mode else {}))
        foretold = damage(lm, edits, progress=False)
        foretold.insert(0, "setting", setting)
        frames.append(foretold.assign(perplexity=perplexity(lm, texts, edits=edits), perplexity_before=before))
    return pd.concat(frames, ignore_index=True)


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a setting, and one for "all": n, felt and its max (felt_relative, median first), ratio and its max (of
    perplexity), rho and rho_norm (Spearman's, of felt_relative and of update_norm with the ratio), slope with its
    interval (of log ratio on log felt_relative), and for each of RISES how many edits rise so much, the areas under the
    ROC curves of felt_relative and of update_norm for these, and the cut of felt_relative with the fewest misjudged,
    and how many those are."""
    rows = []
    for setting, group in [*frame.groupby("setting", sort=False), ("all", frame)]:
        felt, ratio = group["felt_relative"], ratios(group)
        row = {"setting": setting, "n": len(group), "felt": felt.median(), "felt_max": felt.max()}
        row |= {"ratio": ratio.median(), "ratio_max": ratio.max()}
        row |= {"rho": felt.corr(ratio, "spearman"), "rho_norm": group["update_norm"].corr(ratio, "spearman")}
        for rise in RISES:
            found, cut = calibration(group, ratio=rise), threshold(group, ratio=rise)
            if rise == RISES[0]:
                line = found.line
                row |= {"slope": line.slope, "slope_low": line.slope_low, "slope_high": line.slope_high}
            row |= {f"n_{rise:g}": cut.rising, f"auc_{rise:g}": found.detections["felt_relative"].auc}
            row |= {f"auc_norm_{rise:g}": found.detections["update_norm"].auc}
            row |= {f"cut_{rise:g}": cut.cut, f"misjudged_{rise:g}": cut.misjudged}
        rows.append(row)
    return pd.DataFrame(rows)
