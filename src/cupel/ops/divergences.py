"""Distances between predictions, from logits."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def kl(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p || q) of softened predictions, per row: logits `[B, K]` -> `[B]`, in nats.

    >>> import torch; float(kl(torch.zeros(1, 2), torch.zeros(1, 2)))
    0.0
    """
    p = F.log_softmax(p_logits / temperature, dim=-1)
    q = F.log_softmax(q_logits / temperature, dim=-1)
    return (p.exp() * (p - q)).sum(-1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Shannon entropy of softened predictions, per row: logits `[B, K]` -> `[B]`, in nats."""
    p = F.log_softmax(logits / temperature, dim=-1)
    return -(p.exp() * p).sum(-1)


def soft_target_loss(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over rows: logits `[B, K]` -> scalar.

    T^2 makes up for the gradients of softened logits, which shrink as 1 / T^2.
    """
    return temperature**2 * kl(teacher, student, temperature).mean()
