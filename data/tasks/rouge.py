"""ROUGE-L of a summary, as lm-eval's `process_results` of summarisation.yaml."""

from rouge_score.rouge_scorer import RougeScorer

SCORER = RougeScorer(["rougeL"])


def process_results(item: dict, results: list[str]) -> dict[str, float]:
    return {"rougeL": SCORER.score(item["answer"], results[0])["rougeL"].fmeasure}
