"""Names of weights in the files of DiNAT, DiNAT_s and the isotropic DiNAT, which are those of NAT's authors."""

from models.checkpoints.names.nat import LAYOUTS as LAYOUTS
from models.checkpoints.names.nat import authors as authors
