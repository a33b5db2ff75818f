"""Names of weights of ResNets in the files of torchvision and timm, and, with gates, of BangguWu/ECANet and of timm.

Source: Deep Residual Learning for Image Recognition, arXiv:1512.03385, and ECA-Net, arXiv:1910.03151; the state dicts
of timm 1.0 and of ECANet at commit b332f6b.
"""

from models.checkpoints.names.layout import Layout

_BLOCKS = (
    (r"^stem\.conv1\.conv\.", "conv1."),
    (r"^stem\.conv1\.bn\.", "bn1."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.", lambda match: f"layer{int(match[1]) + 1}.{match[2]}."),
    (r"\.conv(\d)\.conv\.", r".conv\1."),
    (r"\.conv(\d)\.bn\.", r".bn\1."),
    (r"\.shortcut\.conv\.", ".downsample.0."),
    (r"\.shortcut\.bn\.", ".downsample.1."),
    (r"^head\.", "fc."),
)


def resnet(source: str, gate: str = "se") -> Layout:
    """The names of torchvision and timm; `gate` is what the gate of a block is called there."""
    return Layout(source, (*_BLOCKS, (r"\.gate\.", f".{gate}.")))


LAYOUTS = (resnet("torchvision and timm"),)


def authors(name: str) -> Layout:
    """The layout in which the authors published a model."""
    return LAYOUTS[0]
