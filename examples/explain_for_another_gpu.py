"""Plan for a GPU that is not there: what effarch would do with an attention layer on an H100, asked on a CPU.

    python examples/explain_for_another_gpu.py [--hardware h100-sxm] [--tokens 8192]

Nothing is compiled or computed: the layer stands on the meta device, which has shapes and no memory, the recognisers read its
graph, and the cost model compares the candidates on the figures of the GPU's profile.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import effcompile


class Attention(nn.Module):
    """Grouped-query attention with a sliding window, 32 heads over 8 key-value heads of 128."""

    def __init__(self, window: int = 1024):
        super().__init__()
        self.window = window
        self.q = nn.Linear(4096, 32 * 128, bias=False)
        self.k = nn.Linear(4096, 8 * 128, bias=False)
        self.v = nn.Linear(4096, 8 * 128, bias=False)
        self.o = nn.Linear(32 * 128, 4096, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, 4096] -> [B, T, 4096]."""
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, 32, 128).transpose(1, 2)
        k = self.k(x).view(batch, tokens, 8, 128).transpose(1, 2).repeat_interleave(4, dim=1)
        v = self.v(x).view(batch, tokens, 8, 128).transpose(1, 2).repeat_interleave(4, dim=1)
        i = torch.arange(tokens, device=x.device)[:, None]
        j = torch.arange(tokens, device=x.device)[None, :]
        outside = (j > i) | (i - j >= self.window)
        scores = torch.matmul(q, k.transpose(2, 3)) * 128**-0.5
        weights = scores.masked_fill(outside, torch.finfo(x.dtype).min).softmax(dim=-1, dtype=torch.float32).to(x.dtype)
        return self.o(torch.matmul(weights, v).transpose(1, 2).reshape(batch, tokens, 4096))


def main() -> None:
    """Print the plan of one layer for one GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", default="h100-sxm", help="a profile's name (`effarch hw list` lists them)")
    parser.add_argument("--tokens", type=int, default=8192)
    args = parser.parse_args()
    with torch.device("meta"):
        layer = Attention().to(torch.bfloat16).eval().requires_grad_(False)
        x = torch.randn(1, args.tokens, 4096, dtype=torch.bfloat16)
    print(effcompile.explain(layer, x, hardware=args.hardware))


if __name__ == "__main__":
    main()
