"""The network as its equations, one sequence at a time in float64 numpy: the oracle of `Transformer`.

Written from MiniMax-01 (arXiv:2501.08313, sections 2 and 4) and the released arithmetic, not from the
package: only the configuration and the names of the weights are shared. `defects` names known mistakes that
the tests put back to see that a comparison catches them.
"""

import numpy as np

from whorl.model.config import ModelConfig


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def rms_norm(x, weight, eps):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def head_slopes(num_heads, layer, num_layers):
    """2^(-8 (h+1) / H) for a power of two (the only case here), times the factor of the depth."""
    assert num_heads & (num_heads - 1) == 0
    series = 2.0 ** (-8 * np.arange(1, num_heads + 1) / num_heads)
    return series * (1 - layer / max(num_layers - 1, 1) + 1e-5)


def lightning_layer(x, w, config, layer, defects):
    """One token after the other: S = exp(-slope) S + k^T v, o = q S."""
    H, K = config.num_heads, config.head_dim
    projected = silu(x @ w["qkv_proj.weight"].T)
    if "key rows not head-major" in defects:
        q, k, v = projected.reshape(-1, 3, H, K).transpose(1, 0, 2, 3)
    else:
        q, k, v = projected.reshape(-1, H, 3, K).transpose(2, 0, 1, 3)
    if "no silu on the values" in defects:
        v = (x @ w["qkv_proj.weight"].T).reshape(-1, H, 3, K)[:, :, 2]
    # The package holds slopes in fp32, as the checkpoints do, so the oracle rounds them once too.
    decay = np.exp(-head_slopes(H, layer, config.num_layers).astype(np.float32).astype(np.float64))
    state, out = np.zeros((H, K, K)), []
    for t in range(len(x)):
        state = decay[:, None, None] * state + k[t][:, :, None] * v[t][:, None, :]
        out.append((q[t][:, None, :] @ state)[:, 0])
    out = np.stack(out)
    if "norm per head" in defects:
        out = rms_norm(out, w["norm.weight"].reshape(H, K), config.lightning_norm_eps).reshape(-1, H * K)
    else:
        eps = config.norm_eps if "block eps in the inner norm" in defects else config.lightning_norm_eps
        out = rms_norm(out.reshape(-1, H * K), w["norm.weight"], eps)
    return (sigmoid(x @ w["output_gate.weight"].T) * out) @ w["out_proj.weight"].T


def rotary(x, config, defects):
    """Rotate pairs (j, j + rotary/2) of the leading dimensions of x `[T, K]` by t theta^(-2j/rotary)."""
    rotary_dim = config.head_dim if config.rotary_dim is None else config.rotary_dim
    if "rotary over the whole head" in defects:
        rotary_dim = config.head_dim
    half, turned = rotary_dim // 2, x.copy()
    for j in range(half):
        a, b = (2 * j, 2 * j + 1) if "interleaved rotary" in defects else (j, j + half)
        angle = np.arange(len(x)) * config.rope_theta ** (-2 * j / rotary_dim)
        turned[:, a] = x[:, a] * np.cos(angle) - x[:, b] * np.sin(angle)
        turned[:, b] = x[:, b] * np.cos(angle) + x[:, a] * np.sin(angle)
    return turned


def softmax_layer(x, w, config, defects):
    H, KV, K = config.num_heads, config.num_kv_heads or config.num_heads, config.head_dim

    def project(name, heads):
        y = x @ w[f"{name}_proj.weight"].T
        if config.qkv_bias:
            y = y + w[f"{name}_proj.bias"]
        return y.reshape(-1, heads, K)

    q, k, v = project("q", H), project("k", KV), project("v", KV)
    if config.qk_norm:
        q = rms_norm(q, w["q_norm.weight"], config.norm_eps)
        k = rms_norm(k, w["k_norm.weight"], config.norm_eps)
    future = np.triu(np.full((len(x), len(x)), -np.inf), 1)
    heads = []
    for h in range(H):
        group = h % KV if "query heads dealt out in turn" in defects else h // (H // KV)
        query, key = rotary(q[:, h], config, defects), rotary(k[:, group], config, defects)
        heads.append(softmax(query @ key.T / np.sqrt(K) + future) @ v[:, group])
    return np.concatenate(heads, axis=-1) @ w["o_proj.weight"].T


def feed_forward(x, w, config, defects):
    def swiglu(row, gate_up, down):
        gate, up = np.split(gate_up @ row, 2)
        return down @ (silu(gate) * up)

    if not config.num_experts:
        return np.stack([swiglu(row, w["gate_up.weight"], w["down.weight"]) for row in x])
    out = np.zeros_like(x)
    for t, row in enumerate(x):
        probs = softmax(w["gate.weight"] @ row)
        chosen = np.argsort(-probs)[: config.experts_per_token]
        total = 1.0 if "router not renormalised" in defects else probs[chosen].sum()
        for e in chosen:
            out[t] += probs[e] / total * swiglu(row, w["gate_up"][e], w["down"][e])
    return out


def log_probs(config: ModelConfig, weights: dict[str, np.ndarray], tokens, defects=()) -> np.ndarray:
    """Log-probabilities `[T, V]` of the next token after each token of one sequence."""
    alpha = (2 * config.num_layers) ** 0.25 if config.alpha is None else config.alpha
    if "alpha of the 80-layer model" in defects:
        alpha = 3.5565588200778455
    period = config.softmax_period
    x = weights["embed_tokens.weight"][np.asarray(tokens)]
    for layer in range(config.num_layers):
        prefix = f"layers.{layer}."
        w = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        own = {name.removeprefix("self_attn."): w[name] for name in w if name.startswith("self_attn.")}
        ffn = {name.removeprefix("feed_forward."): w[name] for name in w if name.startswith("feed_forward.")}

        def attend(y, layer=layer, own=own):
            if period and (layer + 1) % period == 0:
                return softmax_layer(y, own, config, defects)
            return lightning_layer(y, own, config, layer, defects)

        def feed(y, ffn=ffn):
            return feed_forward(y, ffn, config, defects)

        for name, function in (("input_layernorm", attend), ("post_attention_layernorm", feed)):
            normed = rms_norm(x, w[f"{name}.weight"], config.norm_eps)
            if config.residual == "pre":
                x = x + function(normed)
            elif "residual carries the raw value" in defects:
                x = alpha * x + function(normed)
            else:
                x = alpha * normed + function(normed)
    hidden = rms_norm(x, weights["norm.weight"], config.norm_eps)
    logits = hidden @ weights["embed_tokens.weight" if config.tied else "lm_head.weight"].T
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
