"""Token labelling: a linear head predicts soft classes for every token of the last stage, besides the image's class.

loss = CE(class) + token_weight · mean over tokens of CE(token).

Source: Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers", NeurIPS 2021
(arXiv 2104.10858), where the weight is 0.5. The head belongs to training: the model that is evaluated does
not have it, whereas the authors' adds half of the largest token logits to its own. Their code takes the class of the
image from its label map; here it is that of its folder.

Shapes: B = batch, H W = map of the last stage, C = its channels, K = classes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.errors import UserError


class TokenHead(nn.Linear):
    """(B, H, W, C) → (B, H, W, K), initialised as the heads of the models are."""

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def loss(self, tokens_BHWC: Tensor, targets_BHWK: Tensor, label_smoothing: float) -> Tensor:
        """Cross entropy with the targets, the mean over tokens and images.

        Raises:
            ValueError: the targets are not for these tokens.
        """
        if tokens_BHWC.shape[:3] != targets_BHWK.shape[:3]:
            raise UserError(
                f"task: the model has {tuple(tokens_BHWC.shape[1:3])} tokens, got targets for "
                f"{tuple(targets_BHWK.shape[1:3])}; the last of the model's strides must be the stride of its tokens"
            )
        logits = self(tokens_BHWC).float()
        return F.cross_entropy(logits.flatten(0, 2), targets_BHWK.flatten(0, 2), label_smoothing=label_smoothing)

    def join(self, optimizer: torch.optim.Optimizer, weight_decay: float) -> None:
        """Trained by the rules of the model's own head: no decay of the bias, and no layer decay of the rate."""
        optimizer.add_param_group({"params": [self.weight], "weight_decay": weight_decay})
        optimizer.add_param_group({"params": [self.bias], "weight_decay": 0.0})


def width_of(model: nn.Module) -> int:
    """Channels of the tokens that its logits are pooled from: of its last map, unless it says otherwise."""
    return getattr(model, "pooled_dim", model.channels[-1])


def with_tokens(
    model: nn.Module, images: Tensor, labels: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Logits, auxiliary losses, and the tokens (B, H, W, C) that the logits were pooled from, of one pass."""
    x_BNC, grid, losses = model.forward_tokens(images)
    tokens_BHWC = x_BNC[:, grid.prefix :].unflatten(1, (grid.height, grid.width))
    logits, of_pool = model.classify_with_losses(x_BNC, grid, labels)
    return logits, losses | of_pool, tokens_BHWC


def prepare(data: Any, token_weight: float, model: nn.Module) -> None:
    """Tells the data which tokens its label maps are for: those of the last of `model.strides`.

    Raises:
        ValueError: a weight without label maps or the reverse, or images that are not whole tokens.
    """
    folder = getattr(data, "token_labels", None)
    if (folder is not None) != (token_weight > 0):
        raise UserError(
            "task: token labels and their weight go together, got "
            f"task.token_weight={token_weight} and data.token_labels={folder}; set both, or 0 and null"
        )
    if folder is None:
        return
    stride = model.strides[-1]
    size = data.image_size if isinstance(data.image_size, tuple) else (data.image_size, data.image_size)
    if any(side % stride for side in size):
        raise UserError(
            f"task: token labels need images of whole tokens, which are {stride} pixels wide, "
            f"got image_size={data.image_size}; set image_size to a multiple of {stride}"
        )
    data.token_grid = tuple(side // stride for side in size)
