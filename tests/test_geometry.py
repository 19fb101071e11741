"""Similarities, norms and maps of keys: equal to their formulae on a tiny random model."""

import numpy as np
import pytest
import torch

from nbkit.errors import RequestError
from nbkit.keys import geometry
from nbkit.keys.extract import keys, token_keys

TEMPLATES = ["{}", "The river runs. {}", "I. {}"]


def test_similarity_and_norm_of_every_key(tiny, requests):
    frame = geometry.key_geometry(tiny, requests, 1, TEMPLATES)
    found = keys(tiny, requests, 1, TEMPLATES)
    assert len(frame) == 9 and frame["prefix"].tolist() == ["plain", "prefixed", "prefixed"] * 3
    np.testing.assert_allclose(frame["norm"], found.norm(dim=-1).flatten())
    expected = torch.cosine_similarity(found, found[:, :1], dim=-1).flatten()
    np.testing.assert_allclose(frame["similarity"], expected, rtol=1e-9)
    assert frame["case_id"].tolist() == ["0"] * 3 + ["1"] * 3 + ["2"] * 3
    assert frame["request"].tolist() == [0] * 3 + [1] * 3 + [2] * 3


def test_key_vectors(tiny, requests):
    vectors = geometry.key_vectors(tiny, requests, 1, TEMPLATES)
    assert set(vectors) == {geometry.PLAIN, geometry.MEAN}
    random = torch.randn(tiny.d_mlp, tiny.d_mlp, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moment = random @ random.T + torch.eye(tiny.d_mlp)
    solved = geometry.key_vectors(tiny, requests, 1, TEMPLATES, second_moment=moment)[geometry.SOLVED]
    np.testing.assert_allclose(solved @ moment.numpy(), vectors[geometry.MEAN], rtol=1e-8)


HALVES = {"one": [1.0] * 48, "other": [1.0, 4.0] + [1.0] * 46}  # diagonals of C


def test_split_half_agreement_by_hand_and_its_scale(tiny, monkeypatch):
    def second_moment(lm, layer, texts, n_tokens, cache):
        assert (layer, n_tokens, cache) == (1, 50, None)
        return torch.diag(torch.tensor(HALVES[texts[0]], dtype=torch.float64))

    monkeypatch.setattr(geometry, "second_moment", second_moment)
    vectors = np.zeros((3, 48))
    vectors[0, :2], vectors[1, 1], vectors[2, :2] = 1, 5, [3, -3]
    found = geometry.split_half_agreement(tiny, 1, vectors, ["one", "other"], n_tokens=100)
    slanted = 1.25 / np.sqrt(2 * (1 + 1 / 16))  # of (1, 1) and (1, 1/4)
    np.testing.assert_allclose(found, [slanted, 1, slanted], rtol=1e-12)
    again = geometry.split_half_agreement(tiny, 1, 7 * vectors, ["one", "other"], n_tokens=100)
    np.testing.assert_allclose(again, found, rtol=1e-12)
    ridged = geometry.split_half_agreement(tiny, 1, vectors, ["one", "other"], n_tokens=100, ridge=1.0)
    one, other = [1 / 2, 1 / 2], [1 / (1 + 51 / 48), 1 / (4 + 51 / 48)]  # C's mean eigenvalues are 1 and 51/48
    slanted = np.dot(one, other) / np.linalg.norm(one) / np.linalg.norm(other)
    np.testing.assert_allclose(ridged, [slanted, 1, slanted], rtol=1e-12)


def test_split_half_agreement_is_that_of_every_other_text(tiny):
    texts = [f"{verb} the {thing}" for verb in ("I found", "You sold", "Ann has") for thing in ("harp.", "river in K.")]
    texts = [text + " It is located in Vouda, behind the old drum." * 4 for text in texts]
    twice = [text for text in texts for _ in range(2)]
    vectors = np.random.default_rng(0).normal(size=(4, tiny.d_mlp))
    np.testing.assert_allclose(geometry.split_half_agreement(tiny, 1, vectors, twice), 1, rtol=1e-9)
    assert (geometry.split_half_agreement(tiny, 1, vectors, texts) < 0.999).all()


def test_pca_keeps_distances_in_the_plane_and_says_its_variance():
    vectors = {"a": np.array([[0.0, 0, 0], [3, 0, 0], [0, 4, 0]]), "b": np.array([[1.0, 1, 0], [2, 2, 0], [0, 1, 0]])}
    frame = geometry.embed(vectors, ["x", "y", "x"], method="PCA")
    assert frame["vector"].tolist() == ["a"] * 3 + ["b"] * 3 and frame["group"].tolist() == ["x", "y", "x"] * 2
    first, second = frame[["x", "y"]].to_numpy()[1:3]
    assert np.linalg.norm(first - second) == pytest.approx(5)
    assert sum(frame.attrs["variance"]) == pytest.approx(1)
    of_units = geometry.embed({"a": vectors["a"][1:], "b": vectors["b"][:2]}, ["x", "y"], method="PCA", unit=True)
    assert np.linalg.norm(of_units[["x", "y"]].diff().to_numpy()[1]) == pytest.approx(np.sqrt(2))


def test_tsne_separates_clusters_and_repeats_itself():
    random = np.random.default_rng(0)
    vectors = {"k": np.concatenate([random.normal(0, 0.1, (20, 5)), random.normal(9, 0.1, (20, 5))])}
    groups = ["near"] * 20 + ["far"] * 20
    frame, again = (geometry.embed(vectors, groups) for _ in range(2))
    assert frame.equals(again)
    middles = frame.groupby("group")[["x", "y"]].mean()
    spread = frame.groupby("group")[["x", "y"]].std().to_numpy().max()
    assert np.linalg.norm(middles.loc["near"] - middles.loc["far"]) > 2 * spread


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="UMAP"):
        geometry.embed({"k": np.eye(4)}, ["a"] * 4, method="UMAP")
    with pytest.raises(ValueError, match="3 groups do not fit 4"):
        geometry.embed({"k": np.eye(4)}, ["a"] * 3)


def test_likeness_holds_no_key_to_itself(tiny, requests):
    frame = geometry.likeness_by_layer(tiny, requests, [True, False, True], [1], TEMPLATES)
    found = keys(tiny, requests, 1, TEMPLATES)
    unit = found[:, 0] / found[:, 0].norm(dim=-1, keepdim=True)
    centres = [unit[2], unit[0] + unit[2], unit[0]]
    first = torch.stack([of_text[0] for of_text in token_keys(tiny, [r.text for r in requests], 1)])
    expected = {"plain": found[:, 0], "prefixed": found[:, 1:].mean(1), "first token": first}
    assert frame["vector"].tolist() == [name for name in expected for _ in requests]
    for name, vectors in expected.items():
        cosines = [torch.cosine_similarity(a, b, dim=0).item() for a, b in zip(vectors, centres, strict=True)]
        np.testing.assert_allclose(frame.loc[frame["vector"] == name, "similarity"], cosines, rtol=1e-9)
    assert frame["chosen"].tolist() == [True, False, True] * 3
    alone = geometry.likeness_by_layer(tiny, requests, [True, False, False], [1], TEMPLATES)
    assert alone.groupby("chosen")["similarity"].agg(lambda values: values.isna().all()).to_dict() == {
        False: False, True: True}  # fmt: skip
    with pytest.raises(RequestError, match="no request is chosen"):
        geometry.likeness_by_layer(tiny, requests, [False] * 3, [1], TEMPLATES)


def test_similarity_by_position(tiny):
    texts = ["Vouda is located in Krela.", "Ann plays the harp.", "I."]
    frame = geometry.position_similarity(tiny, texts, [0, 2], n_positions=4)
    first, second, third = token_keys(tiny, texts, 2)
    of_layer = frame[frame["layer"] == 2]
    assert of_layer["position"].tolist() == [0, 1, 2, 3, *range(min(4, len(third)))]
    assert of_layer["pair"].tolist() == [0] * 4 + [1] * min(4, len(third))
    expected = torch.cosine_similarity(first[:4], second[:4], dim=-1)
    np.testing.assert_allclose(of_layer["similarity"][:4], expected, rtol=1e-9)
