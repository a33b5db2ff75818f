"""Every recipe states the published numbers: those of the papers and of their authors' settings, written out here."""

import functools
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image
from timm.optim import create_optimizer_v2
from torchvision.transforms import InterpolationMode, v2

from conf import kinds, recipes
from conf.source import GIVEN
from data.augment import Augment
from data.transforms import FILTERS, DrawnCrop, Evaluation, EvaluationTransform, TrainTransform
from models.factory import build_model
from models.tasks.effective_batch import scaled_rate
from models.tasks.schedule import Schedule
from tests.compositions import compose_once

GOLDENS = Path(__file__).parent / "goldens" / "recipes"
NAMES = [name for name in recipes.names() if name.endswith("_in1k")]  # published; the others are ours
PAPERS = sorted({name.partition("/")[0] for name in NAMES})
FIXED = {"_convert_", "attention", "image_size", "in_channels", "num_classes"}  # of what every model is given
IMAGES = 1_281_167  # for training, in ImageNet-1k


class Row(NamedTuple):
    """Published: what training and evaluation use, and what they give; None where there is none.

    px: of the images. gpu: images on each of 8 GPUs. lr, warmup_lr, min_lr: for all their images together. epochs,
    cooldown, warmup: in epochs, the cooldown after the others. decay: of weights. clip: norm of gradients. path: the
    drop path of the last block. blocks: of the model. side: pixels before the centre crop. ema: decay of the average.
    """

    px: int
    gpu: int
    lr: float
    warmup_lr: float
    min_lr: float
    epochs: int
    cooldown: int
    warmup: int
    decay: float
    clip: float | None
    path: float
    blocks: int
    side: int
    ema: float | None
    top1: float | None


PUBLISHED = """
name                         px gpu      lr warm-up     min epochs  + in decay clip path blocks side         ema top1
agent/cswin_base            224  64  0.0005   1e-06   1e-05    300 10 20   0.1    -  0.5     40  256     0.99992 84.7
agent/cswin_base_384        384  32 2.5e-06 2.5e-06 2.5e-07     20 10  0 1e-08    -  0.7     40  438      0.9998 85.8
agent/cswin_small           224 128   0.001   2e-06   2e-05    300 10 20  0.05    -  0.4     40  256     0.99984 83.9
agent/cswin_tiny            224 128   0.001   2e-06   2e-05    300 10 20  0.05    -  0.2     25  256     0.99984 83.1
agent/deit_base             224 128   0.001   1e-06   1e-05    300  0 20  0.05  5.0  0.3     12  256           - 82.0
agent/deit_small            224 128   0.001   1e-06   1e-05    300  0 20  0.05  5.0  0.1     12  256           - 80.5
agent/deit_small_448        448  64  0.0005   5e-07   5e-06    300  0 20  0.05  5.0  0.1     12  512           - 83.1
agent/deit_tiny             224 512   0.004   4e-06   4e-05    300  0 20  0.05  5.0    0     12  256           - 74.9
agent/pvt_large             224  64  0.0005   1e-06   1e-05    300 10  5  0.05  1.0  0.3     41  256           - 83.7
agent/pvt_medium            224 128   0.001   2e-06   2e-05    300 10  5  0.05  1.0  0.3     28  256           - 83.4
agent/pvt_medium_256        256  64  0.0005   1e-06   1e-05    300 10  5  0.05  1.0  0.3     28  292           - 83.8
agent/pvt_small             224 128   0.001   2e-06   2e-05    300 10  5  0.05    -  0.1     16  256           - 82.2
agent/pvt_tiny              224 128   0.001   2e-06   2e-05    300 10  5  0.05    -  0.1      8  256           - 78.4
agent/swin_base             224  64  0.0005   5e-07   5e-06    300  0 20  0.05  5.0  0.5     24  256           - 84.0
agent/swin_base_384         384  32   1e-05   1e-08   1e-07     30  0  5 1e-08  5.0  0.5     24  384           - 84.9
agent/swin_small            224 128   0.001   1e-06   1e-05    300  0 20  0.05  5.0  0.3     24  256           - 83.7
agent/swin_small_288        288  64  0.0005   5e-07   5e-06    300  0 20  0.05  5.0  0.3     24  288           - 84.1
agent/swin_tiny             224 128   0.001   1e-06   1e-05    300  0 20  0.05  5.0  0.2     12  256           - 82.6
flatten/cswin_base          224  64  0.0005   1e-06   1e-05    300 10 20   0.1    -  0.5     40  256     0.99982 84.5
flatten/cswin_base_384      384  32 2.5e-06 2.5e-06 2.5e-07     20 10  0 1e-08    -  0.7     40  438     0.99982 85.5
flatten/cswin_small         224 128   0.001   2e-06   2e-05    300 10 20  0.05    -  0.4     40  256     0.99984 83.8
flatten/cswin_tiny          224 256   0.002   4e-06   4e-05    300 10 20  0.05    -  0.2     25  256     0.99984 83.1
flatten/pvt_large           224  32 0.00025   5e-07   5e-06    300 10  5  0.05  1.0  0.3     41  256           -    -
flatten/pvt_medium          224  64  0.0005   1e-06   1e-05    300 10  5  0.05  1.0  0.3     28  256           - 83.0
flatten/pvt_small           224  64  0.0005   1e-06   1e-05    300 10  5  0.05    -  0.1     16  256           - 81.7
flatten/pvt_tiny            224 128   0.001   2e-06   2e-05    300 10  5  0.05    -  0.1      8  256           - 77.8
flatten/pvt_v2_b0           224 128   0.001   2e-06   2e-05    300 10  5  0.05    -  0.1      8  256           - 71.1
flatten/pvt_v2_b1           224 128   0.001   2e-06   2e-05    300 10  5  0.05    -  0.1      8  256           - 79.5
flatten/pvt_v2_b2           224 128   0.001   2e-06   2e-05    300 10  5  0.05    -  0.1     16  256           - 82.5
flatten/pvt_v2_b3           224 128   0.001   2e-06   2e-05    300 10  5  0.05  1.0  0.3     28  256           - 83.7
flatten/pvt_v2_b4           224  64  0.0005   1e-06   1e-05    300 10  5  0.05  1.0  0.3     41  256           - 84.0
flatten/swin_base           224  64  0.0005   5e-07   5e-06    300  0 20  0.05  5.0  0.5     24  256           - 83.8
flatten/swin_base_384       384  32   1e-05   1e-08   1e-07     30  0  5 1e-08  5.0  0.5     24  384           - 85.0
flatten/swin_small          224 128   0.001   1e-06   1e-05    300  0 20  0.05  5.0  0.3     24  256           - 83.5
flatten/swin_tiny           224 128   0.001   1e-06   1e-05    300  0 20  0.05  5.0  0.2     12  256           - 82.1
inline/cswin_base           224  64  0.0005   1e-06   1e-05    300 10 20   0.1    -  0.5     40  256 0.999949991 84.5
inline/cswin_base_384       384  32 2.5e-06 2.5e-06 2.5e-07     20 10  0 1e-08    -  0.7     40  438 0.999974995 85.7
inline/cswin_small          224 128   0.001   2e-06   2e-05    300 10 20  0.05    -  0.4     40  256 0.999899985 83.8
inline/cswin_tiny           224 128   0.001   2e-06   2e-05    300 10 20  0.05    -  0.2     25  256 0.999899985 83.2
inline/deit_base            448  64  0.0005   5e-07   5e-06    300  0 20  0.05  5.0  0.1     12  512           - 82.3
inline/deit_small           288 128   0.001   1e-06   1e-05    300  0 20  0.05  5.0  0.1     12  329           - 80.2
inline/deit_tiny            224 512   0.004   4e-06   4e-05    300  0 20  0.05  5.0  0.1     12  256           - 74.5
inline/pvt_large            224  64  0.0005   1e-06   1e-05    300 10  5  0.05  1.0  0.3     41  256           - 83.6
inline/pvt_medium           224 128   0.001   2e-06   2e-05    300 10  5  0.05  1.0  0.3     28  256           - 83.2
inline/pvt_small            224 128   0.001   2e-06   2e-05    300 10  5  0.05    -  0.1     16  256           - 82.0
inline/pvt_tiny             224 128   0.001   2e-06   2e-05    300 10  5  0.05    -  0.1      8  256           - 78.2
inline/swin_base            224  64  0.0005   5e-07   5e-06    300  0 20  0.05  5.0  0.5     24  256           - 84.1
inline/swin_base_384        384  32   1e-05   1e-08   1e-07     30  0  5 1e-08  5.0  0.5     24  384           -    -
inline/swin_small           224 128   0.001   1e-06   1e-05    300  0 20  0.05  5.0  0.3     24  256           - 83.6
inline/swin_tiny            224 128   0.001   1e-06   1e-05    300  0 20  0.05  5.0  0.2     12  256           - 82.4
biformer/tiny               224 128   0.001   1e-06   1e-05    300  0  5  0.05    -  0.1     14  256     0.99996 81.4
biformer/small              224 128   0.001   1e-06   1e-05    300  0  5  0.05    - 0.15     30  256     0.99996 83.8
biformer/small_token_labels 224 128   0.001   1e-06   1e-05    300  0  5  0.05    - 0.15     30  256     0.99996 84.3
biformer/base               224 128   0.001   1e-06   1e-05    300  0  5  0.05    -  0.4     30  256     0.99996 84.3
biformer/base_token_labels  224 128   0.001   1e-06   1e-05    300  0  5  0.05    -  0.4     30  256     0.99996 85.4
biformer/stl                224 128   0.001   1e-06   1e-05    300  0  5  0.05    -  0.1     12  256     0.99996 82.7
convit/tiny                 224 128   0.001   1e-06   1e-05    300  0  5  0.05    -  0.1     12  256           - 73.1
convit/small                224 128   0.001   1e-06   1e-05    300  0  5  0.05    -  0.1     12  256           - 81.4
convit/base                 224 128   0.001   1e-06   1e-05    300  0  5  0.05    -  0.1     12  256           - 82.3
davit/tiny                  224 128   0.001   1e-06   1e-05    300 10  5  0.05  1.0  0.1     12  248           - 82.8
davit/small                 224 128   0.001   1e-06   1e-05    300 10  5  0.05  1.0  0.2     24  248           - 84.2
davit/base                  224 128   0.001   1e-06   1e-05    300 10  5  0.05  1.0  0.4     24  248           - 84.6
lit/small                   224 128   0.001   1e-06   1e-05    300  0 20  0.05  5.0  0.2     12  256           - 81.5
lit/medium                  224 128   0.001   1e-06   1e-05    300  0 20  0.05  5.0  0.3     24  256           - 83.0
lit/base                    224 128   0.001   1e-06   1e-05    300  0 20  0.05  5.0  0.5     24  256           - 83.4
moh/transnext_small_75      224 128   0.001   1e-06   1e-05    300  0  5  0.05  1.0 0.45     37  256           - 84.6
moh/transnext_small_80      224 128   0.001   1e-06   1e-05    300  0  5  0.05  1.0 0.45     37  256           - 84.7
moh/transnext_base_50       224 128   0.001   1e-06   1e-05    300  0  5  0.05  1.0  0.6     38  256           - 84.7
moh/transnext_base_75       224 128   0.001   1e-06   1e-05    300  0  5  0.05  1.0  0.6     38  256           - 84.9
nat/mini                    224 128   0.001   1e-06   5e-06    300 10 20  0.05  5.0  0.2     18  256           - 81.8
nat/tiny                    224 128   0.001   1e-06   5e-06    300 10 20  0.05  5.0  0.2     30  256           - 83.2
nat/small                   224 128   0.001   1e-06   5e-06    300 10 20  0.05  5.0  0.3     30  256           - 83.7
nat/base                    224 128   0.001   1e-06   5e-06    300 10 20  0.05  5.0  0.5     30  256           - 84.3
dinat/mini                  224 128   0.001   1e-06   5e-06    300 10 20  0.05  5.0  0.2     18  256           - 81.8
dinat/tiny                  224 128   0.001   1e-06   5e-06    300 10 20  0.05  5.0  0.2     30  256           - 82.7
dinat/small                 224 128   0.001   1e-06   5e-06    300 10 20  0.05  5.0  0.3     30  256           - 83.8
dinat/base                  224 128   0.001   1e-06   5e-06    300 10 20  0.05  5.0  0.5     30  256           - 84.4
dinat/s_tiny                224 128   0.001   1e-06   5e-06    300 10 20  0.05  5.0  0.2     12  256           - 81.8
dinat/s_small               224 128   0.001   1e-06   5e-06    300 10 20  0.05  5.0  0.3     24  256           - 83.5
dinat/s_base                224 128   0.001   1e-06   5e-06    300 10 20  0.05  5.0  0.5     24  256           - 83.8
nat/isotropic_small         224 128   0.001   1e-06   5e-06    300 10 20  0.05  5.0  0.1     12  256           - 80.0
dinat/isotropic_small       224 128   0.001   1e-06   5e-06    300 10 20  0.05  5.0  0.1     12  256           - 80.8
vitrpb/small                224 128   0.001   1e-06   5e-06    300 10 20  0.05  5.0  0.1     12  256           - 81.2
nat/isotropic_base          224 128   0.001   1e-06   5e-06    300 10 50  0.05  5.0  0.4     12  256      0.9998 81.6
dinat/isotropic_base        224 128   0.001   1e-06   5e-06    300 10 50  0.05  5.0  0.4     12  256      0.9998 82.1
vitrpb/base                 224 128   0.001   1e-06   5e-06    300 10 50  0.05  5.0  0.4     12  256      0.9998 82.5
overlock/xt                 224 256   0.002   1e-06   1e-05    300 10  5  0.05  5.0  0.1     17  242      0.9999 82.7
overlock/t                  224 256   0.002   1e-06   1e-05    300 10  5  0.05  5.0 0.15     30  235      0.9999 84.2
overlock/s                  224 256   0.002   1e-06   1e-05    300 10  5  0.05  5.0  0.4     42  235      0.9999 84.8
overlock/b                  224 256   0.002   1e-06   1e-05    300 10  5  0.05  5.0  0.5     54  229      0.9999 85.1
twins/svt_small             224 128   0.001   1e-06   1e-05    300  0  5  0.05  5.0  0.2     18  256           - 81.7
twins/svt_base              224 128   0.001   1e-06   1e-05    300  0  5  0.05  5.0  0.3     24  256           - 83.2
twins/svt_large             224 128   0.001   1e-06   1e-05    300  0  5  0.05  5.0  0.5     24  256           - 83.7
twins/pcpvt_small           224 128   0.001   1e-06   1e-05    300  0  5  0.05  5.0  0.1     16  256           - 81.2
twins/pcpvt_base            224 128   0.001   1e-06   1e-05    300  0  5  0.05  5.0  0.3     28  256           - 82.7
twins/pcpvt_large           224 128   0.001   1e-06   1e-05    300  0  5  0.05  5.0  0.3     41  256           - 83.1
van/b0                      224 128   0.001   1e-06   1e-06    300 10  5  0.05    -  0.1     13  248           - 75.4
van/b1                      224 128   0.001   1e-06   1e-06    300 10  5  0.05    -  0.1     10  248           - 81.1
van/b2                      224 128   0.001   1e-06   1e-06    300 10  5  0.05    -  0.1     21  248           - 82.8
van/b3                      224 128   0.001   1e-06   1e-06    300 10  5  0.05    -  0.2     38  248           - 83.9
xcit/large_24_p16           224 128   0.001   1e-06   1e-05    400  0  5  0.05    - 0.25     24  224     0.99996 82.9
xcit/large_24_p8            224 128   0.001   1e-06   1e-05    400  0  5  0.05    - 0.25     24  224     0.99996 84.4
xcit/medium_24_p16          224 128   0.001   1e-06   1e-05    400  0  5  0.05    - 0.15     24  224     0.99996 82.7
xcit/medium_24_p8           224 128   0.001   1e-06   1e-05    400  0  5  0.05    - 0.15     24  224     0.99996 83.7
xcit/nano_12_p16            224 128   0.001   1e-06   1e-05    400  0  5  0.05    -    0     12  224     0.99996 69.9
xcit/nano_12_p8             224 128   0.001   1e-06   1e-05    400  0  5  0.05    -    0     12  224     0.99996 73.8
xcit/small_12_p16           224 128   0.001   1e-06   1e-05    400  0  5  0.05    - 0.05     12  224     0.99996 82.0
xcit/small_12_p8            224 128   0.001   1e-06   1e-05    400  0  5  0.05    - 0.05     12  224     0.99996 83.4
xcit/small_24_p16           224 128   0.001   1e-06   1e-05    400  0  5  0.05    -  0.1     24  224     0.99996 82.6
xcit/small_24_p8            224 128   0.001   1e-06   1e-05    400  0  5  0.05    -  0.1     24  224     0.99996 83.9
xcit/tiny_12_p16            224 128   0.001   1e-06   1e-05    400  0  5  0.05    -    0     12  224     0.99996 77.1
xcit/tiny_12_p8             224 128   0.001   1e-06   1e-05    400  0  5  0.05    -    0     12  224     0.99996 79.7
xcit/tiny_24_p16            224 128   0.001   1e-06   1e-05    400  0  5  0.05    - 0.05     24  224     0.99996 79.4
xcit/tiny_24_p8             224 128   0.001   1e-06   1e-05    400  0  5  0.05    - 0.05     24  224     0.99996 81.9
focalnet/tiny_srf           224 128   0.001   1e-06   1e-05    300  0 20     0  5.0  0.2     12  256           - 82.1
focalnet/tiny_lrf           224 128   0.001   1e-06   1e-05    300  0 20     0  5.0  0.2     12  256           - 82.3
focalnet/small_srf          224 128   0.001   1e-06   1e-05    300  0 20     0  5.0  0.3     24  256           - 83.4
focalnet/small_lrf          224 128   0.001   1e-06   1e-05    300  0 20     0  5.0  0.3     24  256           - 83.5
focalnet/base_srf           224 128   0.001   1e-06   1e-05    300  0 20     0  5.0  0.5     24  256           - 83.7
focalnet/base_lrf           224 128   0.001   1e-06   1e-05    300  0 20     0  5.0  0.5     24  256           - 83.9
focalnet/tiny_iso           224 128   0.001   1e-06   1e-05    300  0 20     0  5.0  0.2     12  256           - 74.1
focalnet/small_iso          224 128   0.001   1e-06   1e-05    300  0 20     0  5.0  0.2     12  256           - 80.9
focalnet/base_iso           224 128   0.001   1e-06   1e-05    300  0 20     0  5.0  0.2     12  256           - 82.4
shvit/s1                    224 256   0.004   1e-06   1e-05    300  0  5 0.025    -    0     11  256     0.99996 72.8
shvit/s2                    224 256   0.004   1e-06   1e-05    300  0  5 0.032    -    0     11  256     0.99996 75.2
shvit/s3                    224 256   0.004   1e-06   1e-05    300  0  5 0.035    -    0     13  256     0.99996 77.4
shvit/s4                    256 256   0.004   1e-06   1e-05    300  0  5  0.03    -    0     17  292     0.99996 79.4
flowformer/cv               224  96 0.00075   1e-06   1e-05    300  0  5  0.05  1.0  0.2     19  256           - 80.6
swiftformer/xs              224 256   0.002   1e-06   1e-05    300  0  5 0.025    -    0     20  256     0.99996 75.7
swiftformer/s               224 256   0.002   1e-06   1e-05    300  0  5 0.025    -    0     25  256     0.99996 78.5
swiftformer/l1              224 256   0.002   1e-06   1e-05    300  0  5 0.025    -    0     26  256     0.99996 80.9
swiftformer/l3              224 256   0.002   1e-06   1e-05    300  0  5 0.025    -    0     30  256     0.99996 83.0
"""

# FID of 50,000 samples, thousands of steps before them, and the scale of their guidance. The rest is alike.
SAMPLED = {
    "dit/s_2_in1k": (68.40, 400, 1.0),
    "dit/b_2_in1k": (43.47, 400, 1.0),
    "dit/l_2_in1k": (23.33, 400, 1.0),
    "dit/xl_2_in1k": (9.62, 7000, 1.0),
    "dit/xl_2_guided_in1k": (2.27, 7000, 1.5),
    "moh/dit_s_2_75_in1k": (69.42, 400, 1.0),
    "moh/dit_s_2_90_in1k": (67.25, 400, 1.0),
    "moh/dit_b_2_75_in1k": (43.61, 400, 1.0),
    "moh/dit_b_2_90_in1k": (43.40, 400, 1.0),
    "moh/dit_l_2_75_in1k": (24.29, 400, 1.0),
    "moh/dit_l_2_90_in1k": (23.17, 400, 1.0),
    "moh/dit_xl_2_75_in1k": (10.95, 2000, 1.0),
    "moh/dit_xl_2_90_in1k": (8.56, 7000, 1.0),
    "moh/dit_xl_2_90_guided_in1k": (2.94, 7000, 1.25),
}

# Top-1 of ResNets trained with SGD in stairs, BangguWu/ECANet at b332f6b. The rest is alike.
STAIRS = {
    f"ecanet/{depth}_in1k": top1 for depth, top1 in ((18, 70.92), (34, 74.21), (50, 77.42), (101, 78.65), (152, 78.92))
}

# Drop path and blocks of google-research/maxvit at 70a4707, and top-1 at 224, 384 and 512 pixels. The rest is alike.
MULTI_AXIS = {
    "tiny": (0.2, 11, (83.62, 85.24, 85.72)),
    "small": (0.3, 11, (84.45, 85.74, 86.19)),
    "base": (0.4, 24, (84.95, 86.34, 86.66)),
    "large": (0.6, 24, (85.17, 86.40, 86.70)),
}
MAXVIT = {
    f"maxvit/{size}{f'_{px}' if px != 224 else ''}_in1k": (px, path, blocks, value)
    for size, (path, blocks, top1) in MULTI_AXIS.items()
    for px, value in zip((224, 384, 512), top1, strict=True)
}


NATS = ("dinat", "nat", "vitrpb")  # recipes of SHI-Labs/Neighborhood-Attention-Transformer
LARGE = {  # weights of ImageNet-22k tuned: pixels, decay of weights, blocks, top-1
    "dinat/large_in1k": (224, 1e-4, 30, 86.6),
    "dinat/large_384_in1k": (384, 1e-10, 30, 87.4),
    "dinat/large_384_11x11_in1k": (384, 1e-10, 30, 87.5),
    "dinat/s_large_384_in1k": (384, 1e-5, 24, 87.4),
}
# Trained by ConvNeXt's script, L2ViT at 09ac377 and iLLaMA at dfc93b9: warm-up, drop path, blocks, mixup and cutmix,
# decay of the average, top-1. The rest is alike.
CONVNEXTS = {
    "l2vit/tiny_in1k": (20, 0.1, 12, (0.8, 1.0), 0.9999, 83.1),
    "l2vit/small_in1k": (20, 0.2, 24, (0.8, 1.0), 0.9999, 84.1),
    "l2vit/base_in1k": (20, 0.3, 24, (0.8, 1.0), 0.9999, 84.4),
    "illama/tiny_in1k": (5, 0.0, 12, (0.1, 0.1), None, 75.0),
    "illama/small_in1k": (5, 0.1, 12, (0.5, 0.5), None, 79.9),
    "illama/base_in1k": (50, 0.4, 12, (0.95, 1.0), None, 81.6),
}
AVERAGED = ("nat/isotropic_base_in1k", "dinat/isotropic_base_in1k", "vitrpb/base_in1k")


def _rows() -> dict[str, Row]:
    found = {}
    for line in PUBLISHED.strip().splitlines()[1:]:
        name, *cells = line.split()
        values = [None if cell == "-" else int(cell) if cell.isdigit() else float(cell) for cell in cells]
        found[f"{name}_in1k"] = Row(*values)
    return found


ROWS = _rows()
# by its scope all tests of a recipe come together: one process composes it and builds its model
EVERY = pytest.mark.parametrize("name", sorted(ROWS), scope="module")


@functools.cache
def composed(name: str):
    return compose_once([f"recipe={name}"])


@functools.cache
def model_of(name: str) -> torch.nn.Module:
    """Without memory."""
    with torch.device("meta"):
        return build_model(composed(name)[0])


def test_the_recipes_are_the_published_ones():
    assert sorted([*ROWS, *SAMPLED, *STAIRS, *MAXVIT, *LARGE, *CONVNEXTS]) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_that_of_the_recipe(name):
    paper, _, variant = name.removesuffix("_in1k").partition("/")
    sizes = "|_384|_512" if paper == "maxvit" else ""  # one row for all: its windows follow the image
    ends = f"_token_labels|_guided{sizes}"
    assert composed(name)[1]["model"] == f"{paper}_{re.sub(f'({ends})$', '', variant)}"


# The whole configuration


def leaves(node, path=""):
    """Every value by its path; a list is one value."""
    if not isinstance(node, dict) or not node:
        return {path: node}
    parts = [leaves(part, f"{path}.{name}" if path else name) for name, part in node.items()]
    return {key: value for part in parts for key, value in part.items()}


def everything(name: str) -> dict:
    """Everything that decides a result, every default of conf/ included, by its path."""
    cfg, choices = composed(name)
    cfg = cfg.copy()
    for key in ("run", "hydra", "logger", "resume", "data.augment", "data.source", "task.model", "model.attention"):
        OmegaConf.update(cfg, key, None, force_add=True)
    cfg.run = {key: choices[key] for key in ("model", "attention", "data")}
    judged = ("label_smoothing", "token_weight", "auxiliary", "adaptive_clip", "diffusion_steps", "sampling")
    if cfg.task.get("distillation") is not None:
        judged += ("distillation", "distillation_weight", "teacher", "teacher_weights")
    cfg.task = {key: cfg.task[key] for key in judged if cfg.task.get(key) is not None}
    config = OmegaConf.to_container(cfg, resolve=True)
    kinds.check_kinds(config)
    found = leaves(config)
    untouched = {f"{room}{place}" for place in GIVEN if place not in FIXED for room in ("", "model.")}
    return {key: value for key, value in found.items() if key not in untouched or value not in (None, "mixer")}


def recorded(paper: str) -> str:
    """Of a paper's recipes: what all have in common, and what is each one's own."""
    given = {name: everything(name) for name in NAMES if name.startswith(f"{paper}/")}
    first = next(iter(given.values()))
    common = {key: value for key, value in first.items() if all(key in g and g[key] == value for g in given.values())}
    own = {name: {key: g[key] for key in g if key not in common} for name, g in given.items()}
    return yaml.safe_dump({"all": common} | own, sort_keys=True, width=120, default_flow_style=None)


@pytest.mark.parametrize("paper", PAPERS)
def test_the_whole_configuration_is_the_recorded_one(paper):
    """After a change that is meant: UPDATE_GOLDENS=1 pytest tests/test_recipes_numbers.py, and see the difference."""
    golden = GOLDENS / f"{paper}.yaml"
    if os.environ.get("UPDATE_GOLDENS"):
        golden.write_text(recorded(paper))
    assert recorded(paper) == golden.read_text()


# What is to be reproduced


def metric(name: str) -> str:
    """Of the averaged weights where the authors judge those."""
    return "val/top1_ema" if "cswin" in name or name in AVERAGED else "val/top1"


@EVERY
def test_targets(name):
    target, row = recipes.load(name).target, ROWS[name]
    assert set(target) == {"paper", "source", "metric", "value", "tolerance", "images", "status"}
    assert target.paper.startswith("arXiv:") and target.images == 50_000
    assert target.metric == metric(name)
    assert target.value == row.top1 and target.tolerance == (0.3 if "plot" in target.source else 0.2)
    assert target.status in ("unverified", "forward", "trained")


def test_results_that_are_not_in_a_table_are_marked():
    """Read off a plot, or not published at all."""
    sources = {name: recipes.load(name).target.source for name in NAMES}
    of_flatten = {f"flatten/{size}_in1k" for size in ("pvt_medium", "pvt_v2_b3", "pvt_v2_b4")}
    assert {name for name, source in sources.items() if "plot" in source} == of_flatten
    nothing = {"flatten/pvt_large_in1k", "inline/swin_base_384_in1k"}
    assert {name for name, source in sources.items() if source.startswith("none")} == nothing
    assert {name for name, row in ROWS.items() if row.top1 is None} == nothing


def test_fine_tuning_names_what_it_starts_from():
    found = {name: recipes.load(name).get("fine_tunes") for name in NAMES}
    tuned = {name for name in NAMES if name.endswith(("_384_in1k", "_512_in1k"))} - LARGE.keys()
    assert all(found.pop(name) is True for name in LARGE)  # the authors' files of ImageNet-22k
    assert {name for name, source in found.items() if source} == tuned and len(tuned) == 14
    assert all(found[name] == re.sub("_(384|512)", "", name) for name in tuned)


# Learning rates

LATE = ("biformer/", "convit/", "flowformer/", "moh/", "shvit/", "swiftformer/", "twins/", "xcit/")


def rates(name: str, epochs: list[float]) -> list[float]:
    """Learning rates at the given epochs of the run on ImageNet-1k, as the schedule sets them."""
    cfg, _ = composed(name)
    steps = IMAGES // cfg.global_batch
    lr = scaled_rate(cfg.optimizer.lr, cfg.optimizer.reference_batch, cfg.global_batch)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    settings = OmegaConf.to_container(cfg.schedule)
    schedule = Schedule(optimizer, settings, total=cfg.trainer.max_epochs * steps, per_epoch=steps)
    found = []
    for epoch in epochs:
        schedule.step_update(round(epoch * steps))
        found.append(optimizer.param_groups[0]["lr"])
    return found


@EVERY
def test_learning_rates(name):
    """Linear from warmup_lr to lr, then a cosine to min_lr that began at the start, then the cooldown at min_lr.

    Those of `LATE` change after each epoch, one epoch late; the last of 300 epochs has the rate of epoch 298.
    """
    row, late = ROWS[name], int(name.startswith(LATE))

    def cosine(epoch: float) -> float:
        return row.min_lr + 0.5 * (row.lr - row.min_lr) * (1 + np.cos(np.pi * epoch / row.epochs))

    first = {0: row.warmup_lr, 1: row.warmup_lr + (row.lr - row.warmup_lr) / row.warmup} if row.warmup else {0: row.lr}
    later = {epoch: cosine(epoch) for epoch in (max(row.warmup, 2), row.epochs // 2, row.epochs - 1 - late)}
    if row.cooldown:
        later |= {row.epochs: row.min_lr, row.epochs + row.cooldown - 0.001: row.min_lr}
    expected = {epoch + late: rate for epoch, rate in (first | later).items()}
    if late:
        expected |= {0: row.warmup_lr, 1.999: row.warmup_lr, 151.9: cosine(150)}
    assert rates(name, list(expected)) == pytest.approx(list(expected.values()), rel=1e-9)


# The other numbers of the training


@EVERY
def test_batch_and_epochs(name):
    (cfg, _), row, paper = composed(name), ROWS[name], name.partition("/")[0]
    assert (cfg.image_size, cfg.data.batch_size, cfg.global_batch) == (row.px, row.gpu, 8 * row.gpu)
    assert cfg.trainer.max_epochs == row.epochs + row.cooldown
    assert cfg.trainer.gradient_clip_val == row.clip
    assert cfg.task.adaptive_clip == {"shvit": 0.02, "swiftformer": 0.01}.get(paper)
    assert cfg.trainer.precision == ("32-true" if paper in ("agent", "flatten", "van") else "16-mixed")
    assert cfg.task.label_smoothing == 0.1 and cfg.seed == (42 if paper in ("davit", "overlock", "van", *NATS) else 0)
    assert cfg.checkpoint.monitor == metric(name)
    if row.ema is None:
        assert cfg.callbacks.ema is None
    else:
        assert (cfg.callbacks.ema.decay, cfg.callbacks.ema.warmup) == (row.ema, False)
        assert cfg.callbacks.ema._target_ == "models.callbacks.ema.EMA"


@EVERY
def test_drop_path_of_every_block(name):
    row = ROWS[name]
    dropping = [module.drop_path for module in model_of(name).modules() if hasattr(module, "drop_path")]
    found = [getattr(drop, "drop_prob", 0.0) for drop in dropping]
    if name.startswith("xcit/"):  # the same everywhere, and once more for what lies between two branches
        assert found == [row.path] * (2 * row.blocks)
    else:
        assert found == pytest.approx([row.path * i / (row.blocks - 1) for i in range(row.blocks)])


# Decayed although their names end in "bias" or "scale", or they are tables; by paper and backbone.
AGENTS = {f"{way}_bias.{part}" for way in ("gather", "scatter") for part in ("block", "row", "column")}
CLASS = {f"{way}_bias.prefix" for way in ("gather", "scatter")}
FOCUS = {"core.scale", "core.positional_encoding"}
DECAYED = {
    "agent/deit": AGENTS | CLASS,
    "agent/pvt": AGENTS | {"position.table"},
    "agent/swin": AGENTS,
    "agent/cswin": AGENTS,
    "flatten/pvt": FOCUS | {"position.table"},
    "flatten/pvt_v2": FOCUS,
    "flatten/swin": FOCUS,
    "flatten/cswin": FOCUS,
    "inline/pvt": {"position.table"},
    "moh/transnext": {"core.learnable_tokens", "core.learnable_bias"},
    "overlock/overlock": {"grn.gamma", "grn.beta", "0.table", "1.table"},
    "xcit/xcit": {"core.temperature"},
} | {f"{paper}/{paper}": {"bias.table"} for paper in NATS}
SPARED = {
    "convit": {"downsample.class_token", "position.table"},
    "deit": {"stem.class_token", "position.table"},
    "flowformer": {"position.table"},
    "lit": {"bias.table"},
    "swin": {"bias.table"},
    "xcit": {"downsample.class_token"},
    "transnext": {"core.query_embedding", "core.relative_pos_bias_local", "core.temperature"},
}
SPARED_MATRICES = {"twins": {"proj.weight"}, "transnext": {"cpb_fc1.weight", "cpb_fc2.weight"}}


@pytest.mark.parametrize("name", [name for name in sorted(ROWS) if "384" not in name and "448" not in name])
def test_weight_decay(name):
    """On matrices, kernels and the tables above; none on vectors, biases, and what DeiT, Swin and TransNeXt name."""
    (cfg, _), row, model = composed(name), ROWS[name], model_of(name)
    settings = OmegaConf.to_container(cfg.optimizer)
    settings = {key: value for key, value in settings.items() if key != "reference_batch" and value is not None}
    optimizer = create_optimizer_v2(model, **settings)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert {decay[id(p)] for p in trained.values()} == {0.0, row.decay}
    if row.decay == 0:  # of FocalNet nothing decays
        return
    spared = {key for key, p in trained.items() if decay[id(p)] == 0}
    families = ("convit", "deit", "cswin", "flowformer", "swin", "twins", "pvt_v2", "pvt", "transnext", "xcit", "lit")
    families += (*NATS, "overlock")
    family = next((f for f in families if f in name), "")
    tables = {key for key, p in trained.items() if p.ndim > 1 and not key.endswith(".weight")}
    assert all(p.ndim > 1 for key, p in trained.items() if key not in spared)
    assert {last_two(key) for key in tables & spared} == SPARED.get(family, set())
    assert {last_two(key) for key in tables - spared} == DECAYED.get(f"{name.partition('/')[0]}/{family}", set())
    matrices = {last_two(key) for key in spared - tables if trained[key].ndim > 1}
    assert matrices == SPARED_MATRICES.get(family, set()), "every other kernel and matrix decays"
    assert type(optimizer).__name__ == "AdamW"
    assert {(*group["betas"], group["eps"]) for group in optimizer.param_groups} == {(0.9, 0.999, 1e-8)}


def last_two(key: str) -> str:
    return ".".join(key.split(".")[-2:])


# Images


@EVERY
def test_training_images(name):
    """Random resized crop, mirror, RandAugment, in this order; then erasing and mixing of batches."""
    (cfg, _), px, paper = composed(name), ROWS[name].px, name.partition("/")[0]
    augment = Augment.build(OmegaConf.to_container(cfg.augment))
    crop, mirror, *policies = TrainTransform(augment, cfg.image_size, cfg.data.mean).steps
    assert isinstance(crop, v2.RandomResizedCrop) and isinstance(mirror, v2.RandomHorizontalFlip)
    assert (tuple(crop.size), crop.scale) == ((px, px), (0.08, 1.0))
    if paper in ("overlock", "van"):  # draws one of two
        assert type(crop) is DrawnCrop and FILTERS == (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)
    else:
        assert type(crop) is v2.RandomResizedCrop and crop.interpolation == InterpolationMode.BICUBIC
    assert crop.ratio == pytest.approx((3 / 4, 4 / 3)) and mirror.p == 0.5
    if name == "swiftformer/xs_in1k":
        assert isinstance(policies[0], v2.ColorJitter) and policies.pop().brightness == (0.6, 1.4)
    assert len(policies) == (name != "swiftformer/xs_in1k")
    for policy in policies:
        assert type(policy).__name__ == "RandAugment" and policy.num_layers == 2
        assert {(op.magnitude, op.magnitude_std, op.prob) for op in policy.ops} == {(9, 0.5, 0.5)}
        assert "PosterizeIncreasing" in {op.name for op in policy.ops}
    assert augment.erase_mixed == (paper in ("davit", "overlock", "van", *NATS))
    assert augment.erasing == (0 if paper == "flowformer" else 0.25)
    assert (augment.mix_probability, augment.switch_probability) == (1, 0.5)
    unmixed = name in ("swiftformer/xs_in1k", "swiftformer/s_in1k")
    assert augment.cutmix == (0 if unmixed else 1)
    assert augment.mixup == (0 if unmixed or "token_labels" in name else 0.8)
    assert augment.repeated == (3 if paper in ("biformer", "convit", "moh", "shvit", "swiftformer", "xcit") else 1)
    assert cfg.task.token_weight == (0.5 if "token_labels" in name else 0)
    learns = (cfg.task.distillation, cfg.task.distillation_weight, cfg.task.teacher)
    assert (learns == ("hard", 0.5, "timm/regnety_160")) == (paper == "swiftformer")
    assert (cfg.task.distillation is None) == (paper != "swiftformer")


@EVERY
def test_evaluation_images(name):
    """The shorter side, or both (Agent Attention, FLatten, InLine), to the published pixels; then the centre."""
    (cfg, _), row = composed(name), ROWS[name]
    transform = EvaluationTransform(Evaluation.build(OmegaConf.to_container(cfg.data.eval, resolve=True)), row.px)
    squashes = name.partition("/")[0] in ("agent", "flatten", "inline")
    assert transform.target == [row.side] * (2 if squashes else 1) and transform.mode == InterpolationMode.BICUBIC
    assert transform(Image.new("RGB", (640, 480))).shape == (3, row.px, row.px)
    mean, std = ([0.5] * 3, [0.5] * 3) if name.startswith("van/") else ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert (list(cfg.data.mean), list(cfg.data.std)) == (mean, std)


# Stairs


@pytest.mark.parametrize("name", STAIRS)
def test_a_recipe_in_stairs(name):
    """SGD without Nesterov's correction, a tenth of the rate after 30, 60 and 90 of 100 epochs; everything decays."""
    (cfg, _), target = composed(name), recipes.load(name).target
    assert set(target) == {"paper", "source", "metric", "value", "tolerance", "images", "status"}
    assert (target.paper, target.metric, target.value) == ("arXiv:1910.03151", "val/top1", STAIRS[name])
    assert (cfg.image_size, cfg.data.batch_size, cfg.global_batch, cfg.trainer.max_epochs) == (224, 32, 256, 100)
    found = rates(name, [0, 29.9, 30, 59.9, 60, 89.9, 90, 99.9])
    assert found == pytest.approx([0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3, 1e-4, 1e-4])
    assert (cfg.task.label_smoothing, cfg.callbacks.ema, cfg.trainer.gradient_clip_val) == (0.0, None, None)
    settings = {key: value for key, value in OmegaConf.to_container(cfg.optimizer).items() if value is not None}
    settings.pop("reference_batch")
    optimizer = create_optimizer_v2(model_of(name), **settings)
    assert type(optimizer) is torch.optim.SGD
    assert {(g["weight_decay"], g["momentum"], g["nesterov"]) for g in optimizer.param_groups} == {(1e-4, 0.9, False)}
    crop, mirror = TrainTransform(Augment.build(OmegaConf.to_container(cfg.augment)), 224, cfg.data.mean).steps
    assert (crop.scale, crop.interpolation, mirror.p) == ((0.08, 1.0), InterpolationMode.BILINEAR, 0.5)
    evaluation = Evaluation.build(OmegaConf.to_container(cfg.data.eval, resolve=True))
    transform = EvaluationTransform(evaluation, 224)
    assert (transform.target, transform.mode) == ([256], InterpolationMode.BILINEAR)


# Windows and grids


@pytest.mark.parametrize("name", MAXVIT)
def test_a_recipe_of_maxvit(name):
    """4096 images at once, and averages; then 512 larger ones, at one rate, squashed, almost without decay."""
    (px, path, blocks, top1), (cfg, _), target = MAXVIT[name], composed(name), recipes.load(name).target
    assert set(target) == {"paper", "source", "metric", "value", "tolerance", "images", "status"}
    assert (target.paper, target.metric, target.value) == ("arXiv:2204.01697", "val/top1_ema", top1)
    tuned = px != 224
    assert (cfg.image_size, cfg.global_batch, cfg.trainer.max_epochs) == ((px, 512, 30) if tuned else (px, 4096, 300))
    warm = 10_000 / (IMAGES // 4096)  # in epochs
    later = {epoch: 1e-5 + 0.5 * 2.99e-3 * (1 + np.cos(np.pi * epoch / 300)) for epoch in (warm, 150, 299)}
    expected = {0: 5e-5, 15: 5e-5, 29.9: 5e-5} if tuned else {0: 0.0, warm / 2: 1.5e-3} | later
    assert rates(name, list(expected)) == pytest.approx(list(expected.values()), rel=1e-9)
    assert (cfg.callbacks.ema.decay, cfg.callbacks.ema.warmup, cfg.trainer.gradient_clip_val) == (0.9999, False, 1.0)
    assert cfg.checkpoint.monitor == "val/top1_ema" and cfg.task.label_smoothing == 0.1
    model = model_of(name)
    dropping = [module.drop_path.drop_prob for module in model.modules() if hasattr(module, "drop_path")]
    assert dropping[-1] == pytest.approx(path * (blocks - 1) / blocks, abs=1e-5) and len(dropping) == 3 * blocks
    settings = {key: value for key, value in OmegaConf.to_container(cfg.optimizer).items() if value is not None}
    settings.pop("reference_batch")
    optimizer = create_optimizer_v2(model, **settings)
    spared = {id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 1e-8 if tuned else 0.05}
    matrices = [key for key, p in model.named_parameters() if p.ndim > 1 and id(p) in spared]
    assert len(matrices) == 2 * blocks and all(key.endswith("core.bias.table") for key in matrices)
    augment = Augment.build(OmegaConf.to_container(cfg.augment))
    assert (augment.mixup, augment.cutmix, augment.erasing, augment.repeated) == (0.8, 0, 0, 1)
    policy = TrainTransform(augment, cfg.image_size, cfg.data.mean).steps[2]
    assert policy.num_layers == 2 and {(op.magnitude, op.magnitude_std, op.prob) for op in policy.ops} == {(15, 0, 0.5)}
    evaluation = Evaluation.build(OmegaConf.to_container(cfg.data.eval, resolve=True))
    assert EvaluationTransform(evaluation, px).target == ([px, px] if tuned else [256])
    assert set(cfg.data.mean) | set(cfg.data.std) == ({0.5} if tuned else {0.485, 0.456, 0.406, 0.229, 0.224, 0.225})


# ConvNeXt's script


@pytest.mark.parametrize("name", CONVNEXTS)
def test_a_recipe_of_convnexts_script(name):
    """4096 images at once, a cosine that begins behind the warm-up, no mixed precision and no clipping."""
    (warmup, path, blocks, mixed, ema, top1), (cfg, _) = CONVNEXTS[name], composed(name)
    target = recipes.load(name).target
    measured = "val/top1" if ema is None else "val/top1_ema"
    assert set(target) == {"paper", "source", "metric", "value", "tolerance", "images", "status"}
    assert (target.metric, target.value, cfg.checkpoint.monitor) == (measured, top1, measured)
    assert (cfg.image_size, cfg.data.batch_size, cfg.global_batch, cfg.trainer.max_epochs) == (224, 128, 4096, 300)
    assert (cfg.trainer.precision, cfg.trainer.gradient_clip_val, cfg.task.label_smoothing) == ("32-true", None, 0.1)
    half = warmup + (300 - warmup) / 2
    last = 1e-6 + 0.5 * (4e-3 - 1e-6) * (1 + np.cos(np.pi * (299 - warmup) / (300 - warmup)))
    expected = {0: 0.0, warmup / 2: 2e-3, warmup: 4e-3, half: (4e-3 + 1e-6) / 2, 299: last}
    assert rates(name, list(expected)) == pytest.approx(list(expected.values()), rel=1e-9)
    average = cfg.callbacks.ema
    assert (average and (average.decay, average.warmup)) == (ema and (ema, False))
    model = model_of(name)
    dropping = [module.drop_path.drop_prob for module in model.modules() if type(module).__name__ == "Block"]
    assert dropping == pytest.approx([path * i / (blocks - 1) for i in range(blocks)])
    settings = {key: value for key, value in OmegaConf.to_container(cfg.optimizer).items() if value is not None}
    settings.pop("reference_batch")
    optimizer = create_optimizer_v2(model, **settings)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
    spared = {id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    tables = {last_two(key) for key, p in model.named_parameters() if p.ndim > 1 and id(p) in spared}
    assert tables == ({"stem.class_token", "position.table"} if name.startswith("illama/") else set())
    mask = OmegaConf.to_container(cfg.callbacks).get("soft_mask")
    closing = {"tiny": (50, "constant"), "small": (50, "linear"), "base": (25, "linear")}
    assert bool(mask) == name.startswith("illama/")
    if mask:
        size = name.removeprefix("illama/").removesuffix("_in1k")
        assert (mask["epochs"], mask["shape"], mask["start"], cfg.attention.factor.rho) == (*closing[size], 1.0, 0.0)
    augment = Augment.build(OmegaConf.to_container(cfg.augment))
    assert (augment.mixup, augment.cutmix, augment.erasing, augment.repeated) == (*mixed, 0.25, 1)
    assert (augment.mix_probability, augment.switch_probability, augment.erase_mixed) == (1, 0.5, False)
    crop, mirror, policy = TrainTransform(augment, 224, cfg.data.mean).steps
    assert (crop.scale, crop.interpolation, mirror.p) == ((0.08, 1.0), InterpolationMode.BICUBIC, 0.5)
    assert policy.num_layers == 2
    assert {(op.magnitude, op.magnitude_std, op.prob) for op in policy.ops} == {(9, 0.5, 0.5)}
    evaluation = Evaluation.build(OmegaConf.to_container(cfg.data.eval, resolve=True))
    transform = EvaluationTransform(evaluation, 224)
    assert (transform.target, transform.mode) == ([256], InterpolationMode.BICUBIC)
    assert (list(cfg.data.mean), list(cfg.data.std)) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


# Weights of ImageNet-22k


@pytest.mark.parametrize("name", LARGE)
def test_a_recipe_of_large_dinat(name):
    """30 epochs of images that are not mixed, at a rate that falls in a straight line."""
    (px, decay, blocks, top1), (cfg, _), target = LARGE[name], composed(name), recipes.load(name).target
    assert (target.paper, target.metric, target.value) == ("arXiv:2209.15001", "val/top1", top1)
    assert (cfg.image_size, cfg.data.batch_size, cfg.global_batch, cfg.trainer.max_epochs) == (px, 64, 512, 30)
    assert rates(name, [0, 15, 30]) == pytest.approx([5e-5, 2.75e-5, 5e-6], rel=1e-3)
    assert (cfg.trainer.gradient_clip_val, cfg.trainer.precision, cfg.seed) == (5.0, "32-true", 42)
    assert (cfg.task.label_smoothing, cfg.callbacks.ema, cfg.checkpoint.monitor) == (0.1, None, "val/top1")
    augment = Augment.build(OmegaConf.to_container(cfg.augment))
    assert (augment.mixup, augment.cutmix, augment.erasing, augment.repeated) == (0, 0, 0.25, 1)
    dropping = [m.drop_path.drop_prob for m in model_of(name).modules() if hasattr(m, "drop_path")]
    assert dropping == pytest.approx([0.35 * i / (blocks - 1) for i in range(blocks)])
    assert (cfg.optimizer.opt, cfg.optimizer.weight_decay, list(cfg.optimizer.betas)) == ("adamw", decay, [0.9, 0.999])
    evaluation = Evaluation.build(OmegaConf.to_container(cfg.data.eval, resolve=True))
    assert EvaluationTransform(evaluation, px).target == [256 if px == 224 else px]


# Diffusion


@pytest.mark.parametrize("name", SAMPLED)
def test_a_diffusion_recipe(name):
    """That of DiT's train.py, which MoH shares; the target counts samples, and the steps before them."""
    (fid, thousands, guidance), (cfg, _), target = SAMPLED[name], composed(name), recipes.load(name).target
    assert set(target) == {"paper", "source", "metric", "value", "samples", "steps", "status"}
    assert target.paper == ("arXiv:2410.11842" if name.startswith("moh/") else "arXiv:2212.09748")
    assert (target.metric, target.value, target.samples, target.steps) == ("fid", fid, 50_000, 1000 * thousands)
    assert (cfg.trainer.max_steps, cfg.trainer.max_epochs) == (target.steps, -1)
    assert (cfg.image_size, cfg.data.batch_size, cfg.global_batch, cfg.seed) == (256, 32, 256, 0)
    assert (cfg.trainer.precision, cfg.trainer.gradient_clip_val) == ("32-true", None)
    assert (cfg.callbacks.ema.decay, cfg.callbacks.ema.warmup) == (0.9999, False)
    sampling = OmegaConf.to_container(cfg.task.sampling)
    wanted = {"steps": 250, "method": "ddpm", "guidance": guidance, "guided_channels": 3, "clip": False}
    assert {key: sampling[key] for key in wanted} == wanted and cfg.task.diffusion_steps == 1000
    assert cfg.task.auxiliary == {"load_balance": {"weight": 0.01, "reduction": "mean"}}
    model = (cfg.model.latent_stride, cfg.model.in_channels, cfg.model.class_dropout, cfg.model.learn_sigma)
    assert model == (8, 4, 0.1, True)


@pytest.mark.parametrize("name", ["dit/s_2_in1k", "moh/dit_s_2_90_in1k"])
def test_the_optimizer_of_a_diffusion_recipe(name):
    """AdamW without decay, at one rate from the first step to the last."""
    (cfg, _), model = composed(name), model_of(name)
    settings = {key: value for key, value in OmegaConf.to_container(cfg.optimizer).items() if value is not None}
    optimizer = create_optimizer_v2(model, **settings)
    assert type(optimizer).__name__ == "AdamW" and cfg.optimizer.reference_batch is None
    assert {(*g["betas"], g["eps"], g["weight_decay"]) for g in optimizer.param_groups} == {(0.9, 0.999, 1e-8, 0.0)}
    schedule = Schedule(optimizer, OmegaConf.to_container(cfg.schedule), total=cfg.trainer.max_steps, per_epoch=5004)
    for step in (0, 1, 5004, cfg.trainer.max_steps - 1):
        schedule.step_update(step)
        assert {group["lr"] for group in optimizer.param_groups} == {1e-4}


@pytest.mark.parametrize("name", ["dit/s_2_in1k", "moh/dit_s_2_90_in1k"])
def test_images_of_a_diffusion_recipe(name):
    """The centre square of 256 pixels, mirrored or not, in -1 … 1."""
    cfg, _ = composed(name)
    augment = Augment.build(OmegaConf.to_container(cfg.augment))
    assert augment == Augment(interpolation="bicubic", hflip=0.5, ratio=augment.ratio)
    evaluation = Evaluation.build(OmegaConf.to_container(cfg.data.eval, resolve=True))
    picture = Image.effect_noise((640, 480), 50).convert("RGB")
    image = EvaluationTransform(evaluation, cfg.image_size)(picture)
    mirrored = TrainTransform(replace(augment, hflip=1.0), cfg.image_size, cfg.data.mean)(picture)
    assert image.shape == (3, 256, 256) and torch.equal(mirrored.flip(2), image)
    assert list(cfg.data.mean) == list(cfg.data.std) == [0.5, 0.5, 0.5]
