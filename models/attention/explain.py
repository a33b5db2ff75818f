"""Explain mode: every mixer computes its matrix inside the graph, so that relevance can follow it backwards."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from conf.errors import UserError
from models.attention import mixers_of
from models.attention.contract import Mixer
from models.attention.contract.explaining import explaining


@contextmanager
def explained(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Inside, forward passes compute the matrix of every place; afterwards they are there by the name of the mixer.

    Each, as the mixer's `attention_matrix`, has its gradient in `.grad` after `backward`; `over_tokens` of the mixer
    puts both on the map. Of multi-head mixers they are in the graph, so that what they are made of has its gradient by
    way of them; of others they stand beside it. The output is the same to rounding; time and memory are quadratic in
    the tokens of a group.

        with explained(model) as matrices:
            logits = model(images)
        logits[:, label].sum().backward()
        matrices["stages.0.blocks.0.attn"][0].grad

    Raises:
        ValueError: no mixer of the model has a matrix.
    """
    named = {mixer: name for name, mixer in mixers_of(model)}
    owners = {part: name for mixer, name in named.items() for part in mixer.modules()}
    matrices: dict[str, list[Tensor]] = {}
    with explaining() as notes:
        yield matrices
    for module, matrix in notes:
        if module in owners:
            matrices.setdefault(owners[module], []).append(matrix)
    if not any(isinstance(part, Mixer) and part.has_matrix for part in owners):
        kinds = ", ".join(sorted({type(mixer).__name__ for mixer in named})) or "no attention"
        raise UserError(f"explained: no place of the model has a matrix, got {kinds}; choose e.g. attention=softmax")
