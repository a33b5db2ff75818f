"""The table of docs/scale.md: the six models whose steps were recorded, on 1 to 512 GPUs, computed."""

from conf import families
from models.scaling import Machine, row_of, step_of

BATCH, GLOBAL, EPOCHS, IMAGES, IMAGE_KB = 128, 1024, 300, 1_281_167, 110
GPUS = (1, 8, 64, 512)
# of a training step of 128 images of 224 pixels in bf16: milliseconds on an H100, predicted from the recorded launches
# and their compiled code, and the number of kernels
RECORDED = {
    "biformer_base": (55, 2106),
    "davit_base": (47, 1552),
    "agent_swin_base": (44, 1352),
    "flatten_swin_base": (47, 1284),
    "inline_swin_base": (45, 1344),
    "moh_transnext_small_75": (140, 5348),
}
LAUNCH = 15e-6  # seconds of the host for a kernel


def table() -> str:
    """Markdown: a line per model and number of GPUs."""
    head = "| model | GPUs | step (ms) | hours | GPU hours | efficiency | all-reduce (ms) | reads (MB/s) | limit |"
    lines = [head, "|---|--:|--:|--:|--:|--:|--:|--:|---|"]
    for name, (step_ms, kernels) in RECORDED.items():
        size = families.models()[name]["counted"]["parameters"]
        machine = Machine(8, 400.0, 50.0, 440.0, 16, kernels * LAUNCH)
        steps = {n: step_of(n, GLOBAL, BATCH, 1e3 * BATCH / step_ms, size, machine) for n in GPUS}
        for n, step in steps.items():
            row = row_of(n, step, GLOBAL, EPOCHS, IMAGES, IMAGE_KB, steps[1], 1)
            cells = [
                name if n == 1 else "",
                *(str(n), f"{row['step_ms']:.0f}", f"{row['hours']:.1f}", f"{row['gpu_hours']:,.0f}"),
                *(f"{row['efficiency']:.0%}", f"{row['all_reduce_ms']:.1f}", f"{row['storage_mb_per_second']:,.0f}"),
                row["limit"],
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
