"""Changes to models that are built: another mechanism in a timm model, a head gate on a dense one."""

from models.surgery.dense_to_moh import to_moh as to_moh
from models.surgery.replacement import replace as replace
