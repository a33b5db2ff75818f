"""A mixer around another one whose heads it gates: what that one can take, and what it is given.

Shapes: B = batch, N = tokens, C = channels.
"""

from typing import Any

from torch import Tensor

from models.attention import AttentionFactory, Grid, Mixer, Refused, Site, TokenWeights, make


class Gating(Mixer):
    """What mechanisms that gate the heads of another have in common; `mixer` is the other.

    Args:
        site: the place in the backbone.
        core: factory of the attention whose heads are gated, any with `accepts.gates`.
        who: what errors call it.
        backend: see `models.attention.Mixer`.

    Raises:
        Refused: the attention cannot be gated.
    """

    def __init__(self, site: Site, core: AttentionFactory, who: str, backend: str) -> None:
        super().__init__(site, backend)
        self.mixer = make(core, site._replace(stride=1))  # as many tokens as there are gates
        self.accepts, self.reads_stream = self.mixer.accepts, self.mixer.reads_stream
        self.reads_context = self.mixer.reads_context
        self.carries, self.carries_across_stages = self.mixer.carries, self.mixer.carries_across_stages
        self.has_matrix, self.without_matrix = self.mixer.has_matrix, self.mixer.without_matrix
        self.row_stochastic, self.adds = self.mixer.row_stochastic, self.mixer.adds
        self.ignores_grid = self.mixer.ignores_grid
        if not self.accepts.gates:
            inner, why = type(self.mixer).__name__, self.accepts.without_gates
            said = f"{who} cannot gate the heads of {inner}" + (f": {why}" if why else "")
            raise Refused(said, "choose another attention.core, e.g. softmax")

    def handed(self, stream_BNC: Tensor | None, carry: Any) -> dict[str, Any]:
        """Of what a block gives, that which the gated attention takes."""
        given = {"stream_BNC": stream_BNC} if self.reads_stream else {}
        return given | ({"carry": carry} if self.carries else {})

    def attention_matrix(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Of the gated attention, before the gates."""
        return self.mixer.attention_matrix(x_BNC, grid)

    def attend(self, weights: Tensor, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Of the gated attention, without the gates."""
        return self.mixer.attend(weights, x_BNC, grid)

    def over_tokens(self, matrix: Tensor, x_BNC: Tensor, grid: Grid) -> TokenWeights:
        """See `models.attention.Mixer`."""
        return self.mixer.over_tokens(matrix, x_BNC, grid)


def ungated(mixer: Mixer) -> Mixer:
    """The attention whose heads are gated; a mixer that gates none is it itself."""
    while isinstance(mixer, Gating):
        mixer = mixer.mixer
    return mixer
