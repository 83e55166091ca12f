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
    """2^(-8 (h+1) / H) for a power of two, times the factor of the depth.

    Any other number of heads: those of the next smaller power of two, then every other one of the series
    of twice as many (ALiBi, arXiv:2108.12409, as the checkpoints' own code has it).
    """
    power = 1 << (num_heads.bit_length() - 1)
    series = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-8 * np.arange(1, 2 * power + 1, 2) / (2 * power))
    series = np.concatenate([series, between[: num_heads - power]])
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
    slope = head_slopes(H, 0 if "every layer decays as the first" in defects else layer, config.num_layers)
    decay = np.exp(-slope.astype(np.float32).astype(np.float64))
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
    longer = 1.0
    for j in range(half):
        a, b = (2 * j, 2 * j + 1) if "interleaved rotary" in defects else (j, j + half)
        frequency = config.rope_theta ** (-2 * j / rotary_dim)
        if config.rope_scaling is not None and "rope scaling left out" not in defects:
            frequency, longer = stretched(frequency, j, rotary_dim, config)
        angle = np.arange(len(x)) * frequency
        turned[:, a] = longer * (x[:, a] * np.cos(angle) - x[:, b] * np.sin(angle))
        turned[:, b] = longer * (x[:, b] * np.cos(angle) + x[:, a] * np.sin(angle))
    return turned


def stretched(frequency, j, rotary_dim, config):
    """Frequency of pair j after rope scaling, and the factor on rotated queries and keys."""
    scaling = config.rope_scaling
    if scaling.kind == "linear":
        return frequency / scaling.factor, 1.0
    context, full_turn = scaling.original_context, 2 * np.pi
    if scaling.kind == "llama3":
        wavelength = full_turn / frequency
        if wavelength < context / scaling.high_freq_factor:
            return frequency, 1.0
        if wavelength > context / scaling.low_freq_factor:
            return frequency / scaling.factor, 1.0
        smooth = context / wavelength - scaling.low_freq_factor
        smooth /= scaling.high_freq_factor - scaling.low_freq_factor
        return (1 - smooth) * frequency / scaling.factor + smooth * frequency, 1.0

    def pair_of(turns):
        return rotary_dim * np.log(context / (turns * full_turn)) / (2 * np.log(config.rope_theta))

    low = max(np.floor(pair_of(scaling.beta_fast)), 0)
    high = min(np.ceil(pair_of(scaling.beta_slow)), rotary_dim - 1)
    ramp = np.clip((j - low) / max(high - low, 1e-3), 0, 1)
    longer = scaling.attention_factor or 0.1 * np.log(scaling.factor) + 1
    return (1 - ramp) * frequency + ramp * frequency / scaling.factor, longer


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
    distance = np.arange(len(x))[:, None] - np.arange(len(x))
    unseen = distance < 0
    if config.sliding_window is not None and "window left out" not in defects:
        unseen = unseen | (distance >= config.sliding_window)
    future = np.where(unseen, -np.inf, 0.0)
    heads = []
    for h in range(H):
        group = h % KV if "query heads dealt out in turn" in defects else h // (H // KV)
        query, key = rotary(q[:, h], config, defects), rotary(k[:, group], config, defects)
        heads.append(softmax(query @ key.T / np.sqrt(K) + future) @ v[:, group])
    return np.concatenate(heads, axis=-1) @ w["o_proj.weight"].T + w.get("o_proj.bias", 0)


def feed_forward(x, w, config, defects):
    def swiglu(row, gate_up, down, bias=0, out_bias=0):
        gate, up = np.split(gate_up @ row + bias, 2)
        return down @ (silu(gate) * up) + out_bias

    if "gate_up.weight" in w:
        dense = (w["gate_up.weight"], w["down.weight"], w.get("gate_up.bias", 0), w.get("down.bias", 0))
        return np.stack([swiglu(row, *dense) for row in x])
    out = np.zeros_like(x)
    for t, row in enumerate(x):
        probs = softmax(w["gate.weight"] @ row)
        chosen = np.argsort(-probs)[: config.experts_per_token]
        renormalised = config.router_renormalised != ("router the other way" in defects)
        total = probs[chosen].sum() if renormalised else 1.0
        for e in chosen:
            out[t] += probs[e] / total * swiglu(row, w["gate_up"][e], w["down"][e])
    return out


def log_probs(config: ModelConfig, weights: dict[str, np.ndarray], tokens, defects=()) -> np.ndarray:
    """Log-probabilities `[T, V]` of the next token after each token of one sequence."""
    alphas = (2 * config.num_layers) ** 0.25 if config.alpha is None else config.alpha
    if "alpha of the 80-layer model" in defects:
        alphas = 3.5565588200778455
    alphas, betas = np.broadcast_to(alphas, 3), np.broadcast_to(config.beta, 3)
    if "factors of the other branches" in defects:
        alphas, betas = np.roll(alphas, 1), np.roll(betas, 1)
    period = config.softmax_period
    x = weights["embed_tokens.weight"][np.asarray(tokens)]
    for layer in range(config.num_layers):
        prefix = f"layers.{layer}."
        w = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        own = {name.removeprefix("self_attn."): w[name] for name in w if name.startswith("self_attn.")}
        ffn = {name.removeprefix("feed_forward."): w[name] for name in w if name.startswith("feed_forward.")}

        is_softmax = bool(period) and (layer + 1) % period == 0
        if config.attention_layers is not None:
            is_softmax = config.attention_layers[layer] == "softmax"

        def attend(y, layer=layer, own=own, is_softmax=is_softmax):
            if is_softmax:
                return softmax_layer(y, own, config, defects)
            return lightning_layer(y, own, config, layer, defects)

        def feed(y, ffn=ffn):
            return feed_forward(y, ffn, config, defects)

        branches = (
            ("input_layernorm", attend, 1 if is_softmax else 0),
            ("post_attention_layernorm", feed, 2),
        )
        for name, function, branch in branches:
            alpha, beta = alphas[branch], betas[branch]
            normed = rms_norm(x, w[f"{name}.weight"], config.norm_eps)
            if config.residual == "pre":
                x = x + function(normed)
            elif "residual carries the raw value" in defects:
                x = alpha * x + beta * function(normed)
            else:
                x = alpha * normed + beta * function(normed)
    hidden = rms_norm(x, weights["norm.weight"], config.norm_eps)
    logits = hidden @ weights["embed_tokens.weight" if config.tied else "lm_head.weight"].T
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
