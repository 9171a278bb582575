"""KLD from a reference pack: what the top-k tokens, the tail's mass and some sampled tail tokens say of it.

At one position let p be the reference's distribution and q the artefact's, T the reference's k most likely
tokens, P = sum of p and Q = sum of q over all others (the tail). All figures are in nats.

Lower bound. With the tail as one bin, the data processing inequality (Cover and Thomas, Elements of
Information Theory, 2.7 and 2.8: the log-sum inequality) gives

    KL(p || q) >= sum_T p ln(p/q) + P ln(P/Q)

What is missing. Within the tail p' = p/P and q' = q/Q are distributions, and by the chain rule

    KL(p || q) = sum_T p ln(p/q) + P ln(P/Q) + P KL(p' || q')
               = sum_T p ln(p/q) + P E[ln(p(x)/q(x))],  x drawn from p'

Estimate. With r = q'(x)/p'(x) for x drawn from p', E[r] = 1, so E[r - 1 - ln r] = KL(p' || q'): r - 1 is a
control variate (Owen, Monte Carlo theory, 8.9; known as "k3", Schulman 2020). Hence

    bound + P mean(r - 1 - ln r)   over the m sampled tokens

has the expectation of sum_T p ln(p/q) + P mean(ln(p(x)/q(x))), which is KL(p || q). No term is negative, so the estimate
never falls below the bound, and where q is near p its error goes by the square of the difference instead of by
the difference. Its variance at a position is P^2 s^2 / m, with s^2 the samples' variance (n - 1).

Interval of the mean over positions. Rows are drawn anew (positions of a row go together). The rows' estimates hold the
sampling noise already: Var(estimate) = Var(KLD) + E[P^2 s^2 / m], so nothing is added to it. Rows that lie close together
by chance could make it narrower than the noise alone: each end is at least 1.96 standard errors of sampling away.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeft.bench.fidelity import figures_of, log_softmax
from edgeft.bench.stats import bootstrap_ratio_of_sums

ESTIMATE = "estimate from a pack of top-k and sampled tail"
BOUND = "lower bound from a pack of top-k"
Z = 1.959964


def of_reference(
    logits: Any, right: Any, k: int, samples: int, chance: np.random.Generator
) -> dict[str, Any]:
    """What a pack keeps of the reference's scores [positions, vocabulary]; `right` are the tokens that follow.

    top_ids [n, k], the most likely first (the first is the argmax), top_logprobs, tail_mass [n], tail_ids [n, samples]
    drawn from the tail with replacement, tail_logprobs, right_logprobs [n]; log-probabilities over the whole vocabulary.
    """
    p = log_softmax(np.asarray(logits, dtype=np.float64))
    k = min(k, p.shape[1] - 1)  # the tail holds one token at least
    rows = np.arange(len(p))
    found = np.argpartition(-p, k - 1, axis=1)[:, :k]
    found.sort(axis=1)  # of equal ones the first, as argmax has it
    order = np.argsort(-np.take_along_axis(p, found, 1), axis=1, kind="stable")
    top = np.take_along_axis(found, order, 1)
    tail = np.exp(p)
    np.put_along_axis(tail, top, 0.0, 1)
    drawn = np.stack([draw(weights, samples, chance) for weights in tail])
    return {
        "top_ids": top,
        "top_logprobs": np.take_along_axis(p, top, 1),
        "tail_mass": tail.sum(1),
        "tail_ids": drawn,
        "tail_logprobs": np.take_along_axis(p, drawn, 1),
        "right_logprobs": p[rows, right],
    }


def draw(weights: Any, count: int, chance: np.random.Generator) -> Any:
    """`count` indices drawn with replacement by their weights; one without weight is never drawn."""
    reached = np.cumsum(weights)
    if reached[-1] <= 0:  # nothing but underflow: any token's share of a mass of 0 is 0
        return np.full(count, len(weights) - 1)
    return np.searchsorted(reached, chance.random(count) * reached[-1], side="right").clip(
        0, int(np.flatnonzero(weights)[-1])
    )


def against(pack: dict[str, Any], logits: Any, right: Any, vocabulary: int) -> dict[str, Any]:
    """Figures a position of an artefact's scores [n, vocabulary or more] against what `of_reference` kept.

    kld: the estimate, or the bound where the pack has no samples; bound; variance (of the estimate, by sampling);
    same_top1, right_delta, nll, nll_reference as in `fidelity.distances`. Tokens past the reference's vocabulary are left out.
    """
    q = log_softmax(np.asarray(logits)[:, :vocabulary].astype(np.float64))
    top, p_top = pack["top_ids"].astype(np.int64), pack["top_logprobs"].astype(np.float64)
    q_top = np.take_along_axis(q, top, 1)
    rest = np.exp(q)
    np.put_along_axis(rest, top, 0.0, 1)
    p_tail, q_tail = pack["tail_mass"].astype(np.float64), rest.sum(1)
    with np.errstate(divide="ignore"):
        log_p_tail, log_q_tail = np.log(p_tail), np.log(q_tail)
    some = p_tail > 0
    bound = (np.exp(p_top) * (p_top - q_top)).sum(1)
    bound[some] += p_tail[some] * (log_p_tail - log_q_tail)[some]
    bound = np.maximum(bound, 0.0)  # never negative but for rounding
    term: Any = np.zeros((len(q), 1))
    if pack["tail_ids"].shape[1]:
        drawn = pack["tail_ids"].astype(np.int64)
        q_drawn = np.take_along_axis(q, drawn, 1) - log_q_tail[:, None]
        log_r = q_drawn - (pack["tail_logprobs"].astype(np.float64) - log_p_tail[:, None])
        term = np.where(some[:, None], p_tail[:, None] * (np.expm1(log_r) - log_r), 0.0)
    count = term.shape[1]
    rows, q_right = np.arange(len(q)), q[np.arange(len(q)), right]
    p_right = pack["right_logprobs"].astype(np.float64)
    return {
        "kld": bound + term.mean(1),
        "bound": bound,
        "variance": term.var(1, ddof=1) / count if count > 1 else np.zeros(len(rows)),
        "same_top1": (top[:, 0] == q.argmax(1)).astype(int),
        "right_delta": np.exp(q_right) - np.exp(p_right),
        "nll": -q_right,
        "nll_reference": -p_right,
    }


def summarize(found: dict[str, Any], samples: int, answer_only: bool) -> dict[str, Any]:
    """`all` (None where answer positions alone were measured) and `answer` figures, in the shape of `fidelity.summarize`."""
    basis = ESTIMATE if samples else BOUND
    return {
        "all": None if answer_only else part(found, lambda answer: [True] * len(answer)),
        "answer": part(found, lambda answer: [bool(a) for a in answer]),
        "basis": f"{basis}, answer positions alone" if answer_only else basis,
        "formula": "sum over top-k of p ln(p/q) + P ln(P/Q) of the tail as one bin (lower bound) "
        + ("+ P mean(r - 1 - ln r) over sampled tail tokens, r = (q/Q)/(p/P); " if samples else "; ")
        + "nats; mean over positions, interval over rows",
        "logits_build": found["build"],
    }


def part(found: dict[str, Any], keep: Any) -> dict[str, Any]:
    """The figures of `fidelity`, with the bound beside the estimate and the sampling error in its interval."""
    figures = figures_of(found, keep)
    masks = [np.array(keep(answer), dtype=bool) for answer in found["answer"]]
    counts = [int(mask.sum()) for mask in masks]
    bounds = [float(np.array(v)[m].sum()) for v, m in zip(found["bound"], masks, strict=True)]
    noise = sum(float(np.array(v)[m].sum()) for v, m in zip(found["variance"], masks, strict=True))
    error = noise**0.5 / sum(counts)
    low, high = figures["kld_ci95"]
    mean = figures["kld_mean"]
    return {
        **figures,
        "kld_ci95": [min(low, mean - Z * error), max(high, mean + Z * error)],
        "kld_sampling_error": error,
        "kld_lower_bound": sum(bounds) / sum(counts),
        "kld_lower_bound_ci95": bootstrap_ratio_of_sums(bounds, counts),
    }
