"""Names of weights in the files of thuml/Flowformer, Flowformer_CV.

Source: Flowformer, arXiv:2202.06258; the state dict of its code at commit 61f5d8c. Files that a profiler went through
have two counters more per module.
"""

from models.checkpoints.names.layout import Layout

_RULES = (
    (r"^stem\.patch_embed\.", "patch_embed.0."),
    (r"^stem\.start\.position\.table$", "pos_embed"),
    (r"^stages\.(\d+)\.downsample\.conv\.", r"patch_embed.\1.proj."),
    (r"^stages\.(\d+)\.blocks\.", r"blocks.\1."),
    (r"\.scale2\.gamma$", ".gamma"),
)
LAYOUTS = (Layout("thuml/Flowformer", _RULES, constants=r"(^|\.)total_(ops|params)$"),)


def authors(name: str) -> Layout:
    """The layout in which the authors published a model."""
    return LAYOUTS[0]
