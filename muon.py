"""Muon, an optimizer for the matrices inside blocks: of a GPT, a Llama, or a model of your own.

    python train.py config/train_wizard_llama.py   # which sets optimizer = 'muon'

The update is the running mean of the gradient, made orthogonal. Its few strong directions and many
weak ones become equally strong, so that rare ones are learned too: Jordan et al. 2024, "Muon: an
optimizer for hidden layers in neural networks"; weight decay: Liu et al. 2025, arXiv:2502.16982.
"""

from collections import defaultdict

import torch

from runtime import shard_like

# Newton-Schulz polynomials s -> a s + b s^3 + c s^5, one for each step. Each maps the interval left
# by the previous step, at first 0.005 to 1, as close to 1 as possible, with a margin of 2 % for
# rounding: the Polar Express, Amsel et al. 2025, arXiv:2505.16932.
POLYNOMIALS = (
    (8.1400, -23.0368, 16.3967), (3.8518, -2.7640, 0.5084), (3.1586, -2.2837, 0.4577),
    (2.1981, -1.5352, 0.3822), (1.8668, -1.2229, 0.3564),
)


def orthogonal(x, steps):
    """(N, rows, columns), rows <= columns, to the same shape, singular values brought near 1.

    Matrix products apply a polynomial to all singular values at once. 3 steps map 0.005 to 1 into
    0.48 to 1.52, 5 steps to within a thousandth of 1; smaller values stay smaller.
    """
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


def orthogonalize_(updates, steps):
    """Make matrices orthogonal, in place; of more dimensions than two, the last two count.

    Tall matrices are split into square pieces: queries, keys and values separately, if they have
    equally many heads. Pieces of one shape are multiplied together.
    """
    pieces = defaultdict(list)  # by shape
    for update in updates:
        for piece in update.split(update.size(-1), dim=-2):
            pieces[piece.shape].append(piece)
    for same_shape in pieces.values():
        stack = torch.stack(same_shape)  # (N, ..., rows, columns)
        result = orthogonal(stack.flatten(0, -3), steps).view_as(stack)
        torch._foreach_copy_(same_shape, result.unbind())


class Muon(torch.optim.Optimizer):
    """Settings as torch.optim.Muon's; bf16: whether to multiply in it, as torch's always does."""

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.1, ns_steps=3, bf16=False):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay,
                                      ns_steps=ns_steps, bf16=bf16))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group['params'] if p.grad is not None]
            is_sharded = any(hasattr(p, 'full_tensor') for p in params)
            # One whole matrix after another saves memory; all together are faster.
            for together in ([[p] for p in params] if is_sharded else [params]):
                updates = [self.momentum_step(p, group) for p in together]
                orthogonalize_(updates, group['ns_steps'])
                for p, update in zip(together, updates):
                    p.mul_(1 - group['lr'] * group['weight_decay'])
                    p.sub_(shard_like(update, p), alpha=group['lr'])

    def momentum_step(self, p, group):
        """Update the running mean of p's gradient; return it one step ahead (Nesterov), whole."""
        if p not in self.state:
            self.state[p]['momentum_buffer'] = torch.zeros_like(p)
        mean = self.state[p]['momentum_buffer'].lerp_(p.grad, 1 - group['momentum'])
        update = p.grad.lerp(mean, group['momentum'])
        update = update.bfloat16() if group['bf16'] else update
        return update.full_tensor() if hasattr(update, 'full_tensor') else update
