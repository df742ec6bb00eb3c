"""Fixed work against which everything is timed: it must never change, or every baseline is void.

A machine that is twice as slow needs twice the time for this, too. What differs between machines is how they weigh
interpreted code, arithmetic and memory, so there is one for each kind of benchmark.
"""

from __future__ import annotations


class Node:
    __slots__ = ("count", "table")

    def __init__(self, count: int) -> None:
        self.count = count
        self.table: list[int] = []

    def grow(self, free: list[int]) -> bool:
        if self.count % 16 == 0:
            self.table.append(free.pop())
        self.count += 1
        return True


def python() -> None:
    """What the host does in a step: attributes, dictionaries, short lists and tuples, small functions. Some 1 ms."""
    free = list(range(1024))
    nodes = {Node(i): i for i in range(256)}
    work: dict[Node, int] = {}
    for _ in range(8):
        for node, i in nodes.items():
            if node.grow(free):
                work[node] = min(i, node.count)
    found = {(node.count, tuple(node.table)): node for node in work}
    assert len(found) == len(nodes)
