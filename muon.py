"""Muon: an optimizer that takes equally large steps in all directions of a weight matrix.

Adam scales each number of a gradient by itself. Muon makes the momentum of a whole matrix
orthogonal, so that its few strong directions do not drown the many weak ones. An update takes
longer and does more, which suits small corpora: they allow few updates.

Sources: Keller Jordan et al. 2024 (kellerjordan.github.io/posts/muon); the step's size is that of
Liu et al. 2025 (arXiv:2502.16982), so that Adam's learning rates stay right. torch.optim.Muon
computes the same, matrix by matrix, and for matrices alone.
"""

import torch
from torch import nn

MOMENTUM = 0.95
# Newton and Schulz's iteration, with Jordan's coefficients, brings singular values from between
# 0.002 and 1 close to 1 in five steps; exactly 1 would take more steps and gain nothing.
STEPS = 5
LINEAR, CUBIC, QUINTIC = 3.4445, -4.7750, 2.0315


def hidden_matrices(module: nn.Module, heads: tuple[nn.Module, ...]) -> list[nn.Parameter]:
    """Lists the weights of the linear layers of `module` that are none of its output `heads`.

    An output layer's rows are tokens, which occur seldom or often: Adam suits them better.
    """
    layers = (layer for layer in module.modules() if isinstance(layer, nn.Linear))
    return [layer.weight for layer in layers if not any(layer is head for head in heads)]


def orthogonal(matrices: torch.Tensor, dtype=torch.float32) -> torch.Tensor:
    """Returns the orthogonal matrices next to `matrices` (K,N,M), roughly: U V for U S V.

    The products are computed in `dtype`; the 8 bits of bfloat16 are enough.
    """
    x = matrices.mT if matrices.size(1) > matrices.size(2) else matrices
    x = x.to(dtype)
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(STEPS):
        squares = x @ x.mT
        x = LINEAR * x + torch.baddbmm(CUBIC * squares, squares, squares, alpha=QUINTIC) @ x
    return (x.mT if matrices.size(1) > matrices.size(2) else x).to(matrices.dtype)


class Muon(torch.optim.AdamW):
    """Updates `matrices`, which are some of `parameters`, by Muon, and the others by AdamW.

    `dtype` is that of Muon's products, `options` are AdamW's. A matrix has as its state "step" and,
    in "exp_avg", its momentum.
    """

    def __init__(self, parameters, matrices: list[nn.Parameter], dtype: torch.dtype, **options):
        super().__init__(parameters, **options)
        self.dtype = dtype
        self.shapes = {}  # matrices of equal shape are multiplied together
        for matrix in matrices:
            self.shapes.setdefault(matrix.shape, []).append(matrix)

    @torch.no_grad()
    def step(self, closure=None):
        """Does one update. AdamW's part leaves alone what has no gradient, as matrices then."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        kept = [(p, p.grad) for alike in self.shapes.values() for p in alike]
        for alike in self.shapes.values():
            if learning := [p for p in alike if p.grad is not None]:
                self.turn(learning)
        for parameter, _ in kept:
            parameter.grad = None
        super().step()
        for parameter, grad in kept:
            parameter.grad = grad
        return loss

    def turn(self, matrices: list[nn.Parameter]) -> None:
        """Updates matrices of one shape."""
        (group,) = self.param_groups
        gradients = [p.grad for p in matrices]
        for p in matrices:
            if not self.state[p]:
                device = p.device if group["fused"] else "cpu"
                zero = torch.zeros((), device=device)
                self.state[p] = {"step": zero, "exp_avg": torch.zeros_like(p)}
            self.state[p]["step"] += 1
        momenta = [self.state[p]["exp_avg"] for p in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        ahead = torch._foreach_lerp(gradients, momenta, MOMENTUM)  # Nesterov's
        # An entry of the step is then as large as one of Adam's, 0.2 on average.
        size = 0.2 * max(matrices[0].shape) ** 0.5
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        steps = list(orthogonal(torch.stack(ahead), self.dtype).unbind())
        torch._foreach_add_(matrices, steps, alpha=-group["lr"] * size)
