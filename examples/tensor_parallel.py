"""Train a network whose layers lie in parts on several processes, each multiplying its own part on these kernels.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py

The first layer is cut by columns, the second by rows, so that the processes meet once per direction, where the second
adds up its partial sums. DTensor does the cutting and the meeting; this package tells it how its operators may be cut.
"""

from __future__ import annotations

import needs  # noqa: F401

# isort: split
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import matmul_grad
from training import console, digits, parser

BATCH, HIDDEN, RATE = 128, 256, 2e-3


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train as the options say, in each process; the losses."""
    options = parser(__doc__ or "", steps=100).parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mesh = init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),))
    torch.manual_seed(options.seed)  # the same weights and batches in every process
    model = nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10)).to(device)
    if options.backend == "matmul_grad":
        matmul_grad.convert(model)
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    losses = fit(model, options.seed, options.steps, device)
    if dist.get_rank() == 0:
        weight = next(model.parameters())
        part = weight.to_local() if isinstance(weight, DTensor) else weight
        console.print(
            f"{mesh.size()} processes, {options.backend}: loss {losses[0]:.4f} → {losses[-1]:.4f}; "
            f"each holds {tuple(part.shape)} of the {tuple(weight.shape)} of layer 0"
        )
    dist.destroy_process_group()
    return losses


def fit(model: nn.Module, seed: int, steps: int, device: str) -> list[float]:
    images, labels, *_ = (x.to(device) for x in digits(seed))
    optimizer = torch.optim.AdamW(model.parameters(), RATE)

    def step() -> Tensor:
        chosen = torch.randint(len(images), (BATCH,), device=device)
        loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return [step().item() for _ in range(steps)]


if __name__ == "__main__":
    main()
