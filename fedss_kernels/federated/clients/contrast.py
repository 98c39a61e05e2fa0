"""MoCo's loss: a query's own key against a queue of others'.

Kaiming He, Haoqi Fan, Yuxin Wu, Saining Xie and Ross Girshick, "Momentum Contrast for Unsupervised Visual
Representation Learning", CVPR 2020, arXiv:1911.05722, Eq. 1.
"""

import torch
from torch import Tensor

from ...sampled_softmax import sampled_softmax_loss


def contrast(
    queries: Tensor,  # (B, d)
    keys: Tensor,  # (B, d): row i is query i's own
    queue: Tensor,  # (M, d)
    temperature: float,
) -> Tensor:
    """mean_i -log(e^(q_i k_i / T) / (e^(q_i k_i / T) + sum_m e^(q_i m / T))), products those of unit vectors.

    The sampled softmax over rows [keys; queue], of which the queue's are the class set. Other rows' keys are
    not in it. No (B, M) logits are stored.
    """
    B, M = len(keys), len(queue)
    return sampled_softmax_loss(
        queries,
        torch.cat([keys, queue]),
        torch.arange(B, device=queries.device),
        torch.arange(B, B + M, device=queries.device),
        scale=1 / temperature,
    )
