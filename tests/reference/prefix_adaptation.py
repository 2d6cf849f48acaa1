"""The prefix-adaptive output weights of one target, position by position, with the weights made."""

from __future__ import annotations

import numpy as np


def norm(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attend(block, bias, x, heads):
    """The last position of x [t, D] looks at all of them: [D]. bias: [H, distances]."""
    y = norm(x, block["pre_self_attention_layer_norm"]["scale"])
    kernels = {name: part["kernel"] for name, part in block["self_attention"].items()}
    query, keys, values = (
        np.split(part, heads, axis=-1)
        for part in (y[-1] @ kernels["query"], y @ kernels["key"], y @ kernels["value"])
    )
    mixed = []
    for head in range(heads):
        distances = np.arange(len(x))[::-1]
        scores = keys[head] @ query[head] + bias[head, distances]
        weights = np.exp(scores - scores.max())
        mixed.append(weights / weights.sum() @ values[head])
    return np.concatenate(mixed) @ kernels["out"]


def feed_forward(block, x):
    y = norm(x, block["pre_mlp_layer_norm"]["scale"])
    kernels = {name: part["kernel"] for name, part in block["mlp"].items()}
    return (gelu(y @ kernels["wi_0"]) * (y @ kernels["wi_1"])) @ kernels["wo"]


def output_weights(params, kernel, query, prefix, heads):
    """The weights [D, V] after `prefix`, the embedded codes so far, [t, D], t at least 0.

    params: of PrefixAdaptation; kernel: the output weights [D, V]; query: its mean, [D]. Distances
    have a bucket each: targets are short.
    """
    x = np.concatenate([query[None], prefix])
    for number in range(sum(name.startswith("blocks_") for name in params)):
        block, bias = params[f"blocks_{number}"], params["relpos_bias"]["rel_embedding"]
        rows = []
        for t in range(len(x)):
            row = x[t] + attend(block, bias, x[: t + 1], heads)
            rows.append(row + feed_forward(block, row))
        x = np.stack(rows)
    gate = norm(x[-1], params["norm"]["scale"]) @ params["gate"]["kernel"]
    into, out = params["hidden"]["kernel"], params["out"]["kernel"]
    return (np.eye(len(query)) + into @ np.diag(gate) @ out) @ kernel
