"""Requests that were written are read back as they were, whatever was measured of them."""

import json
import math

import numpy as np
import pytest

import nbkit
from nbkit.errors import RequestError, ResultsError
from nbkit.records.request_files import write_requests
from nbkit.records.requests import EditRequest

KINDS = [
    EditRequest("{} is in", "Vouda", "Krela"),
    EditRequest("{} is in", "Vouda", "Krela", "Sennifar", case_id="a 7", relation_id="country"),
    EditRequest("In {} one says", "Vou{}da", " Ja", "Nö\n", 3, ("a", "b"), ("c", "d"), ("Nö\n", "Nö\n"), "P1", ("e",)),
    EditRequest("{} is in", "Vouda", "Krela", "Sennifar", 4, neighborhood_prompts=("c",), neighborhood_targets=("x",)),
    EditRequest("{} is in", "Vouda", "Krela", None, 5, ("a",), ("c",), ("x",), "P1", ("e", "f")),
]


@pytest.mark.parametrize("measured", [False, True])
def test_what_is_written_is_read_back(tmp_path, measured):
    requests = [*KINDS, *nbkit.read_requests("miniworld", limit=20, seed=0)]
    values = [{"perplexity": np.float64(math.inf), "n": i, "guard": None} for i in range(len(requests))]
    path = write_requests(tmp_path / "made" / "mine.json", requests, values if measured else None)
    assert nbkit.read_requests(path) == requests
    records = json.loads(path.read_text("utf-8"))
    assert [one.get("measured", {}).get("n") for one in records] == [
        i if measured else None for i in range(len(requests))
    ]
    assert not measured or records[0]["measured"]["perplexity"] == "inf"
    assert "requested_rewrite" in records[1] and "prompt" in records[3]


def test_what_cannot_be_written_is_said(tmp_path):
    with pytest.raises(RequestError, match="1 measurements for 2 requests"):
        write_requests(tmp_path / "a.json", KINDS[:2], [{}])
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="cannot write a.json"):
        write_requests(tmp_path / "file" / "a.json", KINDS[:2])
