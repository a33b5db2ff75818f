"""Writes a trained model in a form for use elsewhere, and compares it with the model on real images first.

    python -m models.export ckpt=outputs/mine format=onnx -o mine.onnx

ckpt=           what eval.py takes: a run, a checkpoint, or a file of weights with model=... data=... or recipe=...
weights=        raw | ema | auto
format=         {formats}
-o              the file to write, or the folder of format=hf; a new one
dynamic_size=   true: onnx and pt2 take images of other heights and widths too, where the mechanism allows it
fold_norms=     true: batch norms become one with the products in front of them in onnx, pt2 and torchscript
opset=          of ONNX; left out: that of torch's exporter
quantize=       int8: the weights of linear layers of an ONNX file; the accuracy before and after is measured
images=         how many validation images that is measured on; left out: all

Data and preparation are those of the run; data.root=..., image_size=... and others change them as they do for eval.py.
The batch is open in every format. Beside a file stands <file>.json with what is known of it. Exit status 2 and one
sentence where it cannot be done, 1 where what was written computes something else; then nothing is left.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from conf import apart, extras, mistakes, output, resolvers, settings, source, text
from conf.compose import compose
from conf.errors import UserError
from conf.folders import escaped
from models.export.arguments import Wanted, wanted
from models.export.formats import FORMATS
from models.runs import evaluated


def main(given: Sequence[str] | None = None) -> int:
    """Writes the model and says what was written; the status of the process."""
    given = list(sys.argv[1:] if given is None else given)
    if not given or {"-h", "--help"} & {*given}:
        listed = f"\n{' ' * 16}".join(f"{name}: {form.what}" for name, form in FORMATS.items())
        print(__doc__.format(formats=listed).strip())
        return 0 if given else 2
    try:
        asked = wanted(given)
        cfg = configured(asked)
        apart.load_timm()
        from models.export.job import export

        for line in export(cfg, asked):
            print(escaped(line, keep="\n"), flush=True)
    except UserError as error:
        return _refused(str(error).removeprefix("eval: "), error.status)
    except MissingConfigException as error:
        return _refused(mistakes.no_such_option(error))
    except (ConfigCompositionException, OmegaConfBaseException) as error:
        return _refused(mistakes.wrong_key(error, "eval", given))
    except (HydraException, OSError) as error:
        return _refused(" ".join(str(error).split()))
    return 0


def configured(asked: Wanted) -> DictConfig:
    """The configuration of model and data, as an evaluation on the CPU has it.

    Raises:
        UserError: there is no such checkpoint, or a setting that is not used.
    """
    for module in (resolvers, source, text):
        module.register()
    arguments = text.literal([*asked.arguments, "probe=accuracy", "backend=torch"])
    mistakes.refuse_choices(arguments)
    mistakes.refuse_recipes(arguments)
    if not any(argument.startswith("trainer.accelerator=") for argument in arguments):
        arguments.append("trainer.accelerator=cpu")
    cfg = compose("eval", evaluated.offer(arguments))
    if missing := extras.missing(cfg):
        raise UserError("\n".join(missing))
    settings.check(cfg)
    return cfg


def _refused(message: str, status: int = 2) -> int:
    print(escaped(f"models.export: {message}", keep="\n"), file=sys.stderr)
    return status


if __name__ == "__main__":
    with output.kept():
        sys.exit(main())
