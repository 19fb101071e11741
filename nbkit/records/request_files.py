"""Requests written as a file that `read_requests` reads back, with what was measured of each beside it.

    write_requests(path, requests, rows[["perplexity", "risk"]].to_dict("records"))

A record has CounterFact's form where that holds all of a request, and else the eight fields, with the lists that these
have (records/requests.py says how both are read).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nbkit.errors import RequestError, ResultsError
from nbkit.records.files import write_atomically
from nbkit.records.lists import as_requests
from nbkit.records.provenance import plain
from nbkit.records.requests import EditRequest


def record_of(request: EditRequest) -> dict[str, Any]:
    """A request as a record; `read_requests` makes the same request of it."""
    lists = {name: list(getattr(request, name)) for name in ("paraphrase_prompts", "generation_prompts")}
    if request.target_true is None or set(request.neighborhood_targets) - {request.target_true}:
        neighbors = [list(request.neighborhood_prompts), list(request.neighborhood_targets)]
        record = {
            "case_id": request.case_id, "prompt": request.prompt, "subject": request.subject,
            "target_new": request.target_new, "target_true": request.target_true, "relation_id": request.relation_id,
            **lists, "locality_prompt": neighbors[0], "locality_ground_truth": neighbors[1],
        }  # fmt: skip
        return {name: value for name, value in record.items() if value not in (None, [])}
    rewrite = {
        "prompt": request.prompt,
        "relation_id": request.relation_id,
        "target_new": {"str": request.target_new},
        "target_true": {"str": request.target_true},
        "subject": request.subject,
    }
    neighbors = {"neighborhood_prompts": list(request.neighborhood_prompts)}
    about = {} if request.case_id is None else {"case_id": request.case_id}
    return {**about, "requested_rewrite": rewrite, **neighbors, **lists}


def write_requests(
    path: str | Path, requests: Sequence[EditRequest], measured: Sequence[Mapping[str, Any]] | None = None
) -> Path:
    """Writes requests as a JSON list, a record a line, and returns the path; its folder is made if it is missing.

    measured: for each request what its record has besides, in the field `measured`, which readers leave aside; texts,
    numbers and lists of these, an infinite or NaN number as the text "inf", "-inf" or "nan".
    RequestError for other than one mapping a request, ResultsError if the file cannot be written; one that was there
    then stays whole.
    """
    requests, path = as_requests(requests), Path(path).expanduser()
    if measured is not None and len(measured) != len(requests):
        raise RequestError(f"{len(measured)} measurements for {len(requests)} requests; give one for each")
    records = [record_of(request) for request in requests]
    for record, values in zip(records, measured or [], strict=False):
        record["measured"] = plain(dict(values))
    lines = ",\n".join(json.dumps(record, ensure_ascii=False, allow_nan=False) for record in records)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(f"[\n{lines}\n]\n".encode()))
    except OSError as error:
        raise ResultsError(f"cannot write {path.name} to {path.parent}: {error.strerror or error}") from error
    return path
