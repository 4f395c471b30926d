"""Timing on the GPU: CUDA graphs over a ring of weights larger than the L2 cache."""

import statistics

import torch

RING_BYTES = 256 << 20  # five times the L2 of an H100: no weight is there when its turn comes


def ring_length(matrix_bytes: int) -> int:
    return max(2, min(64, -(-RING_BYTES // max(1, matrix_bytes))))


def time_calls(calls, replays: int = 5, rounds: int = 3) -> float:
    """Microseconds per call of `calls`, functions that launch on the current stream.

    All are captured into one graph, which hides the launches' host time; the median of `rounds`.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        calls[0]()
        with torch.cuda.graph(graph, stream=side):
            for call in calls:
                call()
        graph.replay()
        times = []
        for _ in range(rounds):
            begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
            begin.record(side)
            for _ in range(replays):
                graph.replay()
            end.record(side)
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / (replays * len(calls)))
    torch.cuda.current_stream().wait_stream(side)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes per second of a large device-to-device copy, read and written bytes counted.

    The better of the driver's copy and a kernel's: which one wins differs from machine to machine.
    """
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copies = [lambda: target.copy_(source), lambda: torch.mul(source, 2.0, out=target)]
    best = min(time_calls([copy] * 4, replays=5, rounds=5) for copy in copies)
    return 2 * source.numel() * 4 / (best * 1e-6)
