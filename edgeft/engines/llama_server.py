"""Next-token distributions from llama.cpp's own server, for boxes where it alone is installed.

`/completion` takes token ids as they are, and with `n_probs` answers with log-probabilities taken before any sampler
(temperature 0 does not collapse them) of as many tokens as are asked for, the whole vocabulary too: some 5 MB of JSON
a position for 49,152 tokens. A prompt's beginning that the slot has seen is not computed again.
"""

from __future__ import annotations

from typing import Any

import httpx

from edgeft.errors import EnvironmentFault

TIMEOUT_S = 600.0


def next_logprobs(client: httpx.Client, url: str, ids: list[int], vocabulary: int) -> Any:
    """Log-probabilities after `ids` as the server gives them, float64 [vocabulary or more].

    Raises EnvironmentFault where the server refuses or leaves a token of the vocabulary out.
    """
    import numpy as np

    body = {
        "prompt": ids,
        "n_predict": 1,
        "n_probs": 1 << 30,
        "temperature": 0,
        "cache_prompt": True,
        "post_sampling_probs": False,
    }
    try:
        answer = client.post(f"{url}/completion", json=body, timeout=TIMEOUT_S)
    except httpx.HTTPError as error:
        raise EnvironmentFault(
            f"{url} broke off: {type(error).__name__} {error}", f"curl {url}/health"
        ) from error
    if answer.status_code != 200:
        raise EnvironmentFault(
            f"{url} answered {answer.status_code}: {answer.text[:300]}", f"curl {url}/health"
        )
    top = answer.json()["completion_probabilities"][0]["top_logprobs"]
    found = np.full(max(vocabulary, 1 + max(entry["id"] for entry in top)), np.nan)
    found[[entry["id"] for entry in top]] = [entry["logprob"] for entry in top]
    missing = int(np.isnan(found).sum())
    if missing:
        raise EnvironmentFault(
            f"the server gave log-probabilities of all but {missing} of {len(found)} tokens.",
            "pip install 'edgeft[compress]' brings the logits of llama-cpp-python",
        )
    return found
