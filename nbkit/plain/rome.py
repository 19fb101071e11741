"""ROME by its formulae and nothing else: one text at a time, no padding, no batches, none of nbkit's passes.

    loss(δ) = mean_j -1/T Σ_t log p(target_t | x_j, δ) + kl_factor KL(p ‖ p₀) + v_weight_decay ‖δ‖ / ‖v_init‖²
    u  = C⁻¹ k' / ‖C⁻¹ k'‖
    ΔW = (v* - W k) uᵀ / (k·u)

Slow and plain on purpose: it is what nbkit.methods.rome is compared to.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SearchOptions:
    """Of the search for v*, the published ones unless given."""

    lr: float = 0.5
    steps: int = 20
    weight_decay: float = 0.5
    clamp: float = 4.0
    kl_factor: float = 0.0625
    early_stop: float = 0.05
    first_choices: int = 0  # stop at so many losses with the target the first choice on all texts; 0: not so


def rome(
    lm,
    request,
    layer,
    contexts,
    key_mode: str = "mixed",
    C: torch.Tensor | None = None,
    target_init: str = "unprefixed",
    **options,
) -> dict:
    """ΔW (d_out, d_in) of the layer's projection, with v_star, k, u, numerator, denominators and losses on the way.

    options: of the search. Of contexts without "{}" the means leave the plain prompt out; k_u is its key all the same.
    """
    model, projection = lm.model, lm.projection(layer)
    texts, ends, target_ids = tokenized(lm.tokenizer, request.prompt, request.subject, request.target_new, contexts)
    pairs = [run(model, projection, ids)[1:] for ids in texts[:-1]]
    keys = torch.stack([key[end - 1] for (key, _), end in zip(pairs, ends[:-1], strict=True)])
    values = torch.stack([value[end - 1] for (_, value), end in zip(pairs, ends[:-1], strict=True)])
    plain_text, plain_end, _ = tokenized(lm.tokenizer, request.prompt, request.subject, request.target_new, ["{}"])
    _, plain_keys, plain_values = run(model, projection, plain_text[0])
    key_plain, value_plain = plain_keys[plain_end[0] - 1], plain_values[plain_end[0] - 1]
    v_init = value_plain if target_init == "unprefixed" else values.mean(0)
    v_star, losses = search(model, projection, texts, ends, target_ids, v_init, SearchOptions(**options))

    k_direction = key_plain if key_mode == "plain" else keys.mean(0)
    k = keys.mean(0) if key_mode == "prefixed" else key_plain
    Wk = values.mean(0) if key_mode == "prefixed" else value_plain
    u = k_direction if C is None else torch.linalg.solve(C.to(k.dtype), k_direction)
    u = u / u.norm()
    return {
        "delta_W": torch.outer(v_star - Wk, u) / (k @ u),
        "numerator": float((v_star - Wk).norm()),
        "denominator": float((k @ u).abs()),
        "signed_denominator": float(k @ u),
        "losses": losses,
        "k": k,
        "u": u,
        "v_star": v_star,
    }


def tokenized(tokenizer, prompt: str, subject: str, target: str, contexts: list[str]):
    """The prompt behind every context and "{subject} is a", the token after the subject in each, and the target's."""
    target_ids = tokenizer(" " + target, add_special_tokens=False).input_ids
    texts, ends = [], []
    for context in [*contexts, "{} is a"]:
        template = context.replace("{}", prompt) if context != "{} is a" else context
        until = template[: template.index("{}")] + subject
        texts.append(tokenizer(template.replace("{}", subject)).input_ids)
        ends.append(len(tokenizer(until).input_ids))
    return texts, ends, target_ids


def search(
    model, module, texts, ends, target_ids, v_init, options: SearchOptions
) -> tuple[torch.Tensor, list[list[float]]]:
    """v_init + δ, δ added to what `module` says at each text's subject, and the losses on the way."""
    n_contexts = len(texts) - 1
    delta = torch.zeros_like(v_init, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=options.lr)
    losses, p0, n_first = [], None, 0
    for step in range(options.steps):
        nll, first = 0, True
        for ids, end in zip(texts[:-1], ends[:-1], strict=True):
            logits, _, _ = run(model, module, ids + target_ids[:-1], delta, end - 1)
            log_p = logits.log_softmax(-1)
            for t, token in enumerate(target_ids):
                nll = nll - log_p[len(ids) - 1 + t, token] / len(target_ids) / n_contexts
                first = first and int(log_p[len(ids) - 1 + t].argmax()) == token
        logits, _, _ = run(model, module, texts[-1], delta, ends[-1] - 1)
        p = logits[ends[-1] - 1].log_softmax(-1)
        p0 = p.detach() if p0 is None else p0
        kl = options.kl_factor * (p.exp() * (p - p0)).sum()
        decay = options.weight_decay * delta.norm() / v_init.norm() ** 2
        loss = nll + kl + decay
        losses.append([part.item() for part in (loss, nll, kl, decay)])
        n_first += first
        if loss < options.early_stop or step == options.steps - 1 or n_first == (options.first_choices or None):
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            if delta.norm() > options.clamp * v_init.norm():
                delta.mul_(options.clamp * v_init.norm() / delta.norm())
    return v_init + delta.detach(), losses


def run(model, projection, ids: list[int], delta=None, position: int | None = None):
    """Logits (token, vocabulary), keys and values (token, d) of a text; `delta` is added to the value at `position`."""
    seen = {}

    def hook(_module, args, output):
        said = output[0] if isinstance(output, tuple) else output
        values = said.reshape(len(ids), -1)
        if delta is not None:
            at = torch.zeros(len(ids), 1, dtype=values.dtype, device=values.device)
            at[position] = 1
            values = values + at * delta
        seen["key"], seen["value"] = args[0].reshape(len(ids), -1).detach(), values.detach()
        values = values.reshape(said.shape)
        return (values, *output[1:]) if isinstance(output, tuple) else values

    handle = projection.register_forward_hook(hook)
    logits = model(torch.tensor([ids], device=model.device), use_cache=False).logits[0]
    handle.remove()
    return logits, seen["key"], seen["value"]
