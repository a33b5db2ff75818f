"""Gaussian diffusion: noise schedules, what training minimises, and chains that turn noise into samples."""

from models.diffusion.losses import training_losses
from models.diffusion.process import Diffusion, Step, linear_diffusion
from models.diffusion.sampling import METHODS, Noise, chain, check_chain
from models.diffusion.spacing import spaced

__all__ = [
    "METHODS",
    "Diffusion",
    "Noise",
    "Step",
    "chain",
    "check_chain",
    "linear_diffusion",
    "spaced",
    "training_losses",
]
