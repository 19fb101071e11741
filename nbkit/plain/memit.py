"""MEMIT, EMMET, AlphaEdit and ENCORE by their formulae, each as its paper writes it, one text at a time.

    MEMIT      ΔW = R Kᵀ (λ C + K_p K_pᵀ + K Kᵀ)⁻¹
    ENCORE     ΔW = R Kᵀ (λ C + norm_weight I + K_p K_pᵀ + K Kᵀ)⁻¹
    EMMET      ΔW = R (Kᵀ C⁻¹ K + ridge I)⁻¹ Kᵀ C⁻¹          no ridge where K is of a single request
    AlphaEdit  ΔWᵀ = [P (K_p K_pᵀ + K Kᵀ) + L₂ I]⁻¹ P K Rᵀ
    NAS        z = z₀ - v + v*',  v*' = v* m / ‖v*‖ of v* = v + δ, or v where ‖v*‖ > 2 m

Slow and plain on purpose: it is what nbkit.methods.memit is compared to.
"""

import torch

from nbkit.plain.rome import SearchOptions, run, search, tokenized


def memit(lm, requests, layers, contexts, update, value_norm=0.0, **options) -> dict[int, torch.Tensor]:
    """{layer: ΔW (d_out, d_in)}. update(K (d_mlp, n), R (d_model, n), layer) -> ΔW; value_norm: m of NAS, if any;
    options: of the search."""
    model, tokenizer = lm.model, lm.tokenizer
    told = [tokenized(tokenizer, r.prompt, r.subject, r.target_new, contexts) for r in requests]
    last = lm.block(layers[-1])
    z = []
    for texts, ends, target_ids in told:
        z_init = run(model, last, texts[0])[2][ends[0] - 1]
        found = search(model, last, texts, ends, target_ids, z_init, SearchOptions(**options))[0]
        if value_norm:
            v = run(model, lm.projection(layers[-1]), texts[0])[2][ends[0] - 1]
            star = v + found - z_init
            found = z_init - v + (v if star.norm() > 2 * value_norm else star * value_norm / star.norm())
        z.append(found)
    z, updates = torch.stack(z, 1), {}
    before = {layer: lm.weight(layer).clone() for layer in layers}
    for place, layer in enumerate(layers):
        K, now = [], []
        for texts, ends, _ in told:
            k = [run(model, lm.projection(layer), ids)[1][end - 1] for ids, end in zip(texts[:-1], ends, strict=False)]
            K.append((k[0] + torch.stack(k[1:]).mean(0)) / 2)
            now.append(run(model, last, texts[0])[2][ends[0] - 1])
        residual = (z - torch.stack(now, 1)) / (len(layers) - place)
        updates[layer] = update(torch.stack(K, 1), residual, layer)
        lm.weight(layer).data += updates[layer].T if lm.architecture.transposed else updates[layer]
    for layer, weight in before.items():
        lm.weight(layer).data.copy_(weight)
    return updates


def memit_update(K, R, C, weight, K_p=None, norm_weight=0.0):
    bound = weight * C + K @ K.T + (0 if K_p is None else K_p @ K_p.T) + norm_weight * torch.eye(len(C), dtype=C.dtype)
    return R @ K.T @ torch.linalg.inv(bound)


def emmet_update(K, R, C, ridge):
    inverse = torch.linalg.inv(C)
    ridge = ridge if K.shape[1] > 1 else 0
    return R @ torch.linalg.inv(K.T @ inverse @ K + ridge * torch.eye(K.shape[1], dtype=K.dtype)) @ K.T @ inverse


def alphaedit_update(K, R, C, threshold, norm_weight, K_p=None):
    values, vectors = torch.linalg.eigh(C)
    P = vectors[:, values < threshold] @ vectors[:, values < threshold].T
    S = K @ K.T + (0 if K_p is None else K_p @ K_p.T)
    return torch.linalg.solve(P @ S + norm_weight * torch.eye(len(C), dtype=C.dtype), P @ K @ R.T).T
