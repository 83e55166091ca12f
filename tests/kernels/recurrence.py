"""Lightning attention as its recurrence, token by token in float64 numpy: the oracle of the fast forms."""

import numpy as np
import torch


def forward(q, k, v, slope, start):
    """Outputs `[H, T, K]` and the states `[T + 1, H, K, K]` before each token and after the last."""
    decay = np.exp(-slope)[:, None, None]
    states, outputs = [start], []
    for t in range(q.shape[1]):
        states.append(decay * states[-1] + np.einsum("hi,hj->hij", k[:, t], v[:, t]))
        outputs.append(np.einsum("hi,hij->hj", q[:, t], states[-1]))
    return np.stack(outputs, axis=1), np.stack(states)


def backward(q, k, v, slope, states, grad_out, grad_final):
    """Gradients of q, k, v and of the incoming state, from those of the outputs and of the final state."""
    decay = np.exp(-slope)[:, None, None]
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    arriving = grad_final  # gradient of the state after token t, all later uses included
    for t in reversed(range(q.shape[1])):
        arriving = arriving + np.einsum("hi,hj->hij", q[:, t], grad_out[:, t])
        dq[:, t] = np.einsum("hj,hij->hi", grad_out[:, t], states[t + 1])
        dk[:, t] = np.einsum("hij,hj->hi", arriving, v[:, t])
        dv[:, t] = np.einsum("hi,hij->hj", k[:, t], arriving)
        arriving = decay * arriving
    return dq, dk, dv, arriving


def rows(q, k, v, slope, start, grad_out, grad_final, lengths):
    """Everything for rows `[S, H, T, K]` of which the first `lengths[s]` tokens count; zeros beyond them."""
    q, k, v, slope, start, grad_out, grad_final = (
        x.detach().double().numpy() for x in (q, k, v, slope, start, grad_out, grad_final)
    )
    result = {name: np.zeros_like(q) for name in ("out", "dq", "dk", "dv")}
    result |= {name: np.zeros_like(start) for name in ("final", "dstate")}
    for s, n in enumerate(lengths):
        row = q[s, :, :n], k[s, :, :n], v[s, :, :n]
        out, states = forward(*row, slope, start[s])
        grads = backward(*row, slope, states, grad_out[s, :, :n], grad_final[s])
        result["out"][s, :, :n], result["final"][s] = out, states[-1]
        for name, grad in zip(("dq", "dk", "dv"), grads, strict=False):
            result[name][s, :, :n] = grad
        result["dstate"][s] = grads[3]
    return result


def relative(found, expected) -> float:
    """max |found - expected| / max |expected|."""
    if isinstance(found, torch.Tensor):
        found = found.detach().double().cpu().numpy()
    return float(np.abs(found - expected).max() / np.abs(expected).max())
