"""The most memory that tensors take up at once, as torch's allocator sees it: kernels' own scratch space included.

A process's resident size also counts the interpreter, its libraries and what malloc has not given back.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the bytes at the peak of `run`, beyond those before it, on the CPU.

    The profiler does not record what other threads free, such as gloo's, which keep what they send. Such a block counts
    until its address is used again.
    """
    gc.collect()  # what an earlier call left would count when it goes
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results = profiler.profiler.kineto_results
    open_nodes, changes = list(results.experimental_event_tree()), []
    while open_nodes:
        node = open_nodes.pop()
        open_nodes += node.children
        if node.tag == _EventType.Allocation:
            changes.append((node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size))
    held: dict[int, int] = {}
    total = peak = 0
    for _, address, size in sorted(changes):
        known = held.pop(address, 0)
        if size > 0:
            held[address] = size
            total += size - known
        else:
            total += size
        peak = max(peak, total)
    return peak
