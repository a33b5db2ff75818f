"""What is done around a whole model: a second look, another model in front of it, further passes in training.

Shapes: B = batch, N = tokens, C = channels.
"""

from typing import Any

from torch import Tensor, nn

from models.layers.grid import Grid

Passed = tuple[list[tuple[Tensor, Grid]], list[dict[str, Tensor]]]  # the map behind each stage, and losses


class Wrapper(nn.Module):
    """Called as `wrapper(model, images, labels) -> Passed` in place of `model.through(images)`, its plain pass.

    It may give further maps in front of those of the stages, which its own `answer` reads.

    A factory is `wrapper(model)`, called once the model is built; what it gives is a part of the model. Losses are
    dicts of scalars with gradient by name, as those of blocks.

    Attributes:
        learns_from_labels: whether it has a loss more when it is given the labels.
    """

    learns_from_labels = False

    def forward(self, model: Any, images: Tensor, labels: Tensor | None = None) -> Passed:
        raise NotImplementedError

    def answer(self, model: Any, maps: list[tuple[Tensor, Grid]], labels: Tensor | None) -> tuple[Tensor, dict]:
        """Logits, and losses by name, each (1,): what the model makes of its last map, unless a wrapper says more."""
        return model.classify_with_losses(*model.finished(*maps[-1]), labels)
