"""The suite's own net: memory that nobody wrote is NaN, and compiled code does not notice."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(3, 1, 2),
        lambda: torch.empty(2, dtype=torch.bfloat16, requires_grad=True),
        lambda: torch.empty_like(torch.ones(2)),
        lambda: torch.empty_strided((2, 2), (1, 2)),
        lambda: torch.ones(2).new_empty(3),
        lambda: torch.ones(2).new_empty((), dtype=torch.float64),
    ],
    ids=["empty", "requires grad", "empty_like", "empty_strided", "new_empty", "scalar"],
)
def test_unwritten_memory_is_nan(make):
    assert make().isnan().all()


def test_integers_are_left_alone():
    assert torch.empty(2, dtype=torch.int64).dtype == torch.ones(1).new_empty(2, dtype=torch.int64).dtype


def test_dynamo_sees_plain_calls():
    def partly_written(x):
        return torch.empty_like(x).copy_(x) + x.new_empty(x.shape).copy_(x) + torch.empty(3).fill_(2.0)

    graphs = []

    def backend(graph, inputs):
        graphs.append([str(getattr(node.target, "__name__", node.target)) for node in graph.graph.nodes])
        return graph

    x = torch.randn(3)
    torch.testing.assert_close(torch.compile(partly_written, backend=backend, fullgraph=True)(x), 2 * x + 2)
    assert graphs[0][1:-1] == ["empty_like", "copy_", "new_empty", "copy_", "add", "empty", "fill_", "add"]
