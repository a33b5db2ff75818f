"""Names of weights in the files of ViT-rpb, which are those of NAT's authors."""

from models.checkpoints.names.nat import LAYOUTS as LAYOUTS
from models.checkpoints.names.nat import authors as authors
