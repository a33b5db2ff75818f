"""The catalogue of faults: what happens to a run, what the program does then, and what is lost.

Each row has tests, marked `@pytest.mark.case(number)`; `python tests/faults/table.py` writes the page of the documents.
"""

from typing import NamedTuple


class Case(NamedTuple):
    """A row of the catalogue.

    fault: what happens. happens: what the program does. lost: at most. untested: what no test here can produce.
    """

    fault: str
    happens: str
    lost: str
    untested: str = ""


STEPS = "the steps since the last checkpoint"
NOTHING = "nothing"

CASES = {
    # a process ends
    1: Case(
        "killed (−9) in the middle of an epoch",
        "the same command goes on and ends with the same bits; loader processes die with it",
        STEPS,
    ),
    2: Case(
        "killed while a checkpoint is written",
        "at every call of the writer: the older checkpoint stands, or the new one is complete; the rest is swept",
        STEPS,
    ),
    3: Case(
        "SIGTERM, to the process or to the whole job",
        "saves the last full step, status 75; loader processes outlive a signal to the job; torchrun makes it 1",
        NOTHING,
    ),
    4: Case(
        "SIGUSR1, to the process or to the whole job",
        "saves the last full step, status 75; so do SIGUSR2, SIGHUP and SIGXCPU; nothing is requeued by Lightning",
        NOTHING,
    ),
    5: Case(
        "Ctrl-C, once or twice",
        "saves, status 130; the second time it ends at once, the last checkpoint stays",
        NOTHING,
    ),
    6: Case(
        "a signal during a validation",
        "stops after the batch of validation; the next start makes up for the validation, as of its epoch",
        NOTHING,
    ),
    7: Case("a signal in the middle of an optimizer step", "the step is finished and saved", NOTHING),
    8: Case(
        "a signal in the middle of accumulated batches",
        "the accumulated step is finished and saved; a second signal ends a step that hangs",
        NOTHING,
    ),
    9: Case(
        "a signal to one process of several, or to all",
        "all stop at the same step, which is saved once; status 75 (torchrun makes it 1)",
        NOTHING,
    ),
    10: Case("one process of several is killed", "the others end and say which; torchrun starts all again", STEPS),
    11: Case("one process of several hangs", "the others end after trainer.timeout and say which", STEPS),
    12: Case("an exception in one process of several", "all end at once; its traceback is in errors/", STEPS),
    13: Case("the job's time is over", "saves, is put into the queue again and continues", NOTHING),
    14: Case("two jobs with one folder", "the second is refused and leaves no trace", NOTHING),
    15: Case(
        "a finished run is started again",
        "says that it has finished and by which limit; what was owed at its end is done; a longer run goes on",
        NOTHING,
    ),
    16: Case(
        "nothing to continue", "refused with what is near, resume=must too; auto says that it starts at 0", NOTHING
    ),
    # storage
    17: Case(
        "the disk is full, a quota is reached, a write fails or takes minutes",
        "older checkpoints stay and training goes on; status 74 after three failures in a row, or where the last step "
        "or that of a stop cannot be saved, with what was needed and what is free; a save is left out where the one "
        "before takes long",
        STEPS,
    ),
    18: Case("the folder for temporary files is full or gone", "it is not used", NOTHING),
    19: Case(
        "the run's folder cannot be written, or is removed under the run",
        "refused in one sentence before work begins; later status 74 after three failures; a folder is made again",
        STEPS,
    ),
    20: Case(
        "a checkpoint is damaged: a bit, half a file, a file less",
        "found by its checksum, the one before is used and said; where none can be read, or a later version wrote "
        "it, status 2: nothing is started and nothing deleted",
        STEPS,
    ),
    21: Case(
        "killed while an old checkpoint is deleted",
        "the rest is swept at the next start; only what was written or verified is ever deleted",
        NOTHING,
    ),
    22: Case("the clock jumps", "the newest checkpoint is that of the highest step", NOTHING),
    # going on
    23: Case(
        "stopped and continued at any places, any number of times",
        "ends as the run that never stopped: weights, moments, averages, best, validations, rows",
        NOTHING,
    ),
    24: Case(
        "a setting or the data that make the result are others", "refused, naming the setting, class or file", NOTHING
    ),
    25: Case(
        "another number of processes, another batch",
        "the images of each step stay: smaller batches or accumulation make them up, or it is refused",
        NOTHING,
    ),
    26: Case("weights of another number of classes", "a new head is said; evaluation refuses", NOTHING),
    27: Case("a checkpoint of another mechanism", "refused by its name", NOTHING),
    28: Case("a checkpoint of another resolution", "init= resizes what depends on it, resume= refuses", NOTHING),
    29: Case("names with prefixes of wrappers", "read", NOTHING),
    30: Case("a file of weights to resume from", "refused in one sentence", NOTHING),
    # files from elsewhere
    31: Case("a pickle with code in it", "never run: read as weights only, or refused in one sentence", NOTHING),
    32: Case("a configuration that names foreign code, a network or too much", "refused with the place in it", NOTHING),
    33: Case("a configuration with interpolations", "refused with the place, also where nothing is built", NOTHING),
    34: Case("an archive that is larger than it says", "refused before it is unpacked", NOTHING),
    35: Case("headers, JSON, links and pipes in place of files", "one sentence with the path, status 2", NOTHING),
    36: Case("a data set with a script, or that names other files", "not run, not read: the row is named", NOTHING),
    37: Case("caches that hold pickles", "never unpickled; an array may not claim more than it holds", NOTHING),
    # data
    38: Case("an image that cannot be read", "named; with on_error=skip left out up to data.max_skipped", NOTHING),
    39: Case("images of other modes", "read as documented", NOTHING),
    40: Case("images of 16 bits or of floats", "scaled, or refused by name", NOTHING),
    41: Case("images that are tiny, thin or huge", "read, or named", NOTHING),
    42: Case("folders that are not as they should be", "named before training, or status 65", NOTHING),
    43: Case(
        "a loader process dies or hangs", "started again at the same batch; a third time, or hanging, 65", NOTHING
    ),
    # numbers, settings, services
    44: Case(
        "a loss, a gradient or weights that are not finite, a loss that jumps, no memory",
        "the step is left out, with its images and module named; status 76 after ten in a row, or where weights or "
        "averages are broken, which are never saved; no memory: one sentence with three settings",
        NOTHING,
        "the memory and the fp16 scaler of a real GPU",
    ),
    45: Case(
        "settings of the wrong kind, out of range, or that nothing reads", "refused before torch is loaded", NOTHING
    ),
    46: Case(
        "Weights & Biases is missing, refuses, is slow, freezes or dies",
        "the run goes on and is not held: it ends within 12 s, a stop within 5; the end says how to upload the rest",
        NOTHING,
    ),
}
