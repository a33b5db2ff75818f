"""The linear classifier: one weight vector and one bias per class.

Source: the head of every backbone here, initialised as in DeiT, arXiv:2012.12877.
Shapes: B = batch, C = features, K = classes.
"""

from torch import nn


class LinearHead(nn.Linear):
    """(B, C) → (B, K).

    Args:
        dim: features C.
        num_classes: K.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__(dim, num_classes)

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)
