"""Lightning attention on one GPU: time and share of the memory floor, beside plain PyTorch and fla if installed.

    python benchmarks/lightning_gpu.py

Times are medians of repeated runs after warming up, between device events. Up to 131,072 tokens they are of replays
of a CUDA graph, so that they are the GPU's; what Python adds when it launches the kernels one by one shows in the
column beside them. The floor of an operation is the bytes it must move once, over the rate of a large copy on the
device, measured first (bytes read and written): forward q, k, v and o; forward and backward these, and q, k, v, do,
dq, dk, dv; decode the fp32 states, read and written.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.testing import do_bench

from whorl.kernels.decode_triton import lightning_step
from whorl.kernels.lightning import lightning, slopes
from whorl.kernels.lightning_triton import lightning_packed

H, K = 32, 128
NUM_LAYERS = 80
LAYERS = (0, 40, 78)
"""Of MiniMax-M1: the first lightning layer forgets fastest (1.1 to 256 tokens), the last slowest (86 to 20,208)."""
CASES = {
    "131,072": (131_072,), "32,768": (32_768,), "4 x 2,048": (2_048,) * 4, "64 x 2,048": (2_048,) * 64,
    "8,192": (8_192,), "1,048,576": (1_048_576,),
}  # fmt: skip
console = Console(width=130)


def milliseconds(run: Callable[[], object]) -> float:
    return do_bench(run, warmup=20, rep=80, return_mode="median")


def replayed(run: Callable[[], object]) -> float:
    """The same as a CUDA graph."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(
        aside
    ):  # whatever compiles or allocates for the first time does so before the capture
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return milliseconds(graph.replay)


def make_qkv(num_tokens: int) -> Tensor:
    qkv = torch.empty(num_tokens, H, 3 * K, device="cuda", dtype=torch.bfloat16)
    for piece in qkv.split(65_536):
        piece.copy_(F.silu(torch.randn(piece.shape, device="cuda")))
    return qkv


Forward = Callable[[Tensor], Tensor]


def both_ways(forward: Forward, qkv: Tensor, grad: Tensor) -> Callable[[], object]:
    def run() -> object:
        leaf = qkv.detach().requires_grad_()  # a new one each time: it belongs to the stream it is made on
        return torch.autograd.grad(forward(leaf), leaf, grad)

    return run


def peers(num_tokens: int, lengths: tuple[int, ...], slope_H: Tensor) -> dict[str, Forward]:
    """The same function by others, on rows of equal length."""
    shape = (len(lengths), lengths[0], H, 3 * K)
    found: dict[str, Forward] = {}

    def plain(qkv: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2).contiguous() for x in qkv.view(shape).split(K, dim=-1))
        return lightning(q, k, v, slope_H, want_state=False)[0].transpose(1, 2).reshape(-1, H, K)

    if num_tokens <= 32_768:
        found["PyTorch"] = plain
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        return found

    def fla(qkv: Tensor) -> Tensor:
        q, k, v = qkv.view(shape).split(K, dim=-1)
        return chunk_simple_gla(q, k, v, g_gamma=-slope_H, scale=1.0)[0].reshape(-1, H, K)

    return found | {"fla": fla}


def attention(rate: float) -> None:
    table = Table(title=f"forward and backward, H {H}, K {K}, bf16; ms (share of the floor)")
    columns = ("tokens", "layer", "forward", "forward + backward", "ns per token", "from Python", "others")
    for column in columns:
        table.add_column(column)
    for name, lengths in CASES.items():
        qkv = make_qkv(sum(lengths))
        grad = torch.randn(len(qkv), H, K, device="cuda", dtype=torch.bfloat16)
        unit = len(qkv) * H * K * 2 / rate / 1e9  # one of q, k, v, o, ...: milliseconds at the copy's rate
        for layer in LAYERS:
            slope_H = slopes(H, layer, NUM_LAYERS).cuda()

            def run(qkv: Tensor, slope_H: Tensor = slope_H, lengths: tuple[int, ...] = lengths) -> Tensor:
                return lightning_packed(qkv, slope_H, lengths, want_state=False)[0]

            clock = replayed if len(qkv) <= 131_072 else milliseconds
            alone, both = functools.partial(run, qkv), both_ways(run, qkv, grad)
            forward, whole = clock(alone), clock(both)
            others = []
            if layer == LAYERS[1]:
                for peer, other in peers(len(qkv), lengths, slope_H).items():
                    times = (
                        milliseconds(functools.partial(other, qkv)),
                        milliseconds(both_ways(other, qkv, grad)),
                    )
                    others.append(f"{peer} {times[0]:.2f}, {times[1]:.2f}")
            table.add_row(
                name, str(layer), f"{forward:.3f} ({4 * unit / forward:.0%})",
                f"{whole:.3f} ({11 * unit / whole:.0%})",
                f"{forward / len(qkv) * 1e6:.2f}, {whole / len(qkv) * 1e6:.2f}",
                f"{milliseconds(alone):.3f}, {milliseconds(both):.3f}", "; ".join(others),
            )  # fmt: skip
        del qkv, grad
    console.print(table)


def decode(rate: float) -> None:
    table = Table(title=f"one token of a lightning layer between its projections, H {H}, K {K}, bf16")
    for column in ("sequences", "ms", "share of the floor", "from Python"):
        table.add_column(column)
    slope_H = slopes(H, 40, NUM_LAYERS).cuda()
    for S in (1, 16, 64, 256, 1024):
        state = torch.randn(S, H, K, K, device="cuda")
        qkv = torch.randn(S, H, 3 * K, device="cuda", dtype=torch.bfloat16)
        gate = torch.randn(S, H * K, device="cuda", dtype=torch.bfloat16)
        weight = torch.ones(H * K, device="cuda", dtype=torch.bfloat16)
        step = functools.partial(lightning_step, qkv, slope_H, state, weight, gate, 1e-6)
        time = replayed(step)
        floor = 2 * state.numel() * 4 / rate / 1e9
        table.add_row(str(S), f"{time:.4f}", f"{floor / time:.0%}", f"{milliseconds(step):.4f}")
    console.print(table)


def copy_rate() -> float:
    """TB/s, bytes read and written."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e9


def main() -> None:
    rate = copy_rate()
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; copy {rate:.2f} TB/s")
    attention(rate)
    decode(rate)


if __name__ == "__main__":
    main()
