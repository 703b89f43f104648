"""Muon, an optimizer for the matrices inside blocks: of a GPT, a Llama, or a model of your own.

    python train.py config/train_wizard_llama.py   # which sets optimizer = 'muon'

The running mean of the gradient, made orthogonal, is the update. A gradient has a few strong
directions and many weak ones. Made orthogonal, all are equally strong, so that rare ones are
learnt as well: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks". With
weight decay: Liu et al. 2025, arXiv:2502.16982.
"""

from collections import defaultdict

import torch

from runtime import shard_like

# Newton-Schulz polynomials s -> a s + b s^3 + c s^5, one a step. Each maps the interval left by
# the step before, at first 0.005 to 1, as close to 1 as possible, with 2 % to spare for rounding:
# the Polar Express, Amsel et al. 2025, arXiv:2505.16932.
POLYNOMIALS = (
    (8.1400, -23.0368, 16.3967), (3.8518, -2.7640, 0.5084), (3.1586, -2.2837, 0.4577),
    (2.1981, -1.5352, 0.3822), (1.8668, -1.2229, 0.3564),
)


def orthogonal(matrices, steps):
    """(N, rows, columns), rows <= columns, to the same shape, singular values brought near 1.

    Products alone apply a polynomial to all singular values at once. 3 steps take each s from
    0.005 to 1 into 0.48 to 1.52, 5 steps to 1 within a thousandth; smaller ones stay smaller.
    """
    x = matrices
    for step in range(steps):
        a, b, c = POLYNOMIALS[min(step, len(POLYNOMIALS) - 1)]
        gram = x @ x.mT  # (N, rows, rows); its singular values are the squares of x's
        if step == 0:  # a matrix's norm is at least its largest singular value: all s <= 1
            norm = torch.linalg.matrix_norm(gram, keepdim=True) + 1e-14
            x, gram = x / norm.sqrt(), gram / norm
        # baddbmm(m, p, q, beta=b, alpha=c) is b m + c p q
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Weights of two dimensions, or of more, which are stacks of matrices: the last two count.

    Tall matrices are split into square pieces, so that queries, keys and values are orthogonalized
    separately. (Jordan's factor for tall matrices, sqrt(rows / columns), is then 1.) Pieces of
    one shape are multiplied together.

    Settings as torch.optim.Muon's: lr, momentum, weight_decay, ns_steps; and bf16: whether to
    multiply in it, since a direction needs few digits. (torch's always does, which is 30 times
    slower on a CPU without such instructions.)
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.1, ns_steps=3, bf16=False):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay,
                                      ns_steps=ns_steps, bf16=bf16))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            pieces = defaultdict(list)  # (weights, gradient) by shape
            for p in group['params']:
                if p.grad is None:
                    continue
                if p not in self.state:
                    self.state[p]['momentum_buffer'] = torch.zeros_like(p)
                mean = self.state[p]['momentum_buffer'].lerp_(p.grad, 1 - group['momentum'])
                gradient = p.grad.lerp(mean, group['momentum'])  # Nesterov: one step further
                p.mul_(1 - group['lr'] * group['weight_decay'])
                weights, is_sharded = p, hasattr(p, 'full_tensor')
                if is_sharded:  # whole matrices, one at a time
                    gradient = gradient.full_tensor()
                    weights = torch.zeros_like(gradient)
                gradient = gradient.bfloat16() if group['bf16'] else gradient
                width = p.size(-1)
                for piece in zip(weights.split(width, dim=-2), gradient.split(width, dim=-2)):
                    pieces[piece[0].shape].append(piece)
                if is_sharded:
                    apply_updates(pieces, group)
                    p.add_(shard_like(weights, p))
            apply_updates(pieces, group)


def apply_updates(pieces, group):
    """Subtract the orthogonal form of all gradients from their weights, and empty `pieces`."""
    for same_shape in pieces.values():
        weights, gradients = zip(*same_shape)
        gradients = torch.stack(gradients)  # (N, ..., rows, columns)
        updates = orthogonal(gradients.flatten(0, -3), group['ns_steps'])
        updates = updates.view(gradients.shape).unbind()
        torch._foreach_sub_(weights, updates, alpha=group['lr'])
    pieces.clear()
