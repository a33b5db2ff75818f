"""A stopped or killed run goes on and ends bit for bit where an uninterrupted one ends."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from models.callbacks.preemption import Preemption, Stopped
from models.callbacks.randomness import StepRandomness
from models.callbacks.signals import ECHO, Requests
from models.checkpoints import latest, read_manifest
from models.runs.identity import compare_configs
from models.runs.resume import RESTARTS, find_resume
from tests.models.callbacks.tiny_run import TinyBatch, fingerprint, fit

ROOT = Path(__file__).parents[3]
SCRIPT = Path(__file__).with_name("tiny_run.py")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Uninterrupted runs by the number of accumulated batches."""
    runs = {}

    def get(accumulate=1):
        if accumulate not in runs:
            folder = tmp_path_factory.mktemp("reference")
            runs[accumulate] = fingerprint(*fit(folder, accumulate_grad_batches=accumulate))
        return runs[accumulate]

    return get


def assert_equal(found, expected):
    different = [
        name
        for name in expected
        if not (
            torch.equal(found[name], value)
            if isinstance(value := expected[name], torch.Tensor)
            else found[name] == value
        )
    ]
    assert found.keys() == expected.keys() and different == []


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("place", ["0.0", "0.4", "0.5", "0.7", "1.2", "1.7", "val 0.0", "val 0.2", "val 1.1"])
def test_a_stopped_run_goes_on_exactly(tmp_path, reference, capfd, place, accumulate):
    """Also in the middle of an accumulated batch, at the end of an epoch and of the run, and while validating."""
    with pytest.raises(Stopped, match="stopped by SIGTERM at step") as stopped:
        fit(tmp_path, signals={place: "SIGTERM"}, accumulate_grad_batches=accumulate)
    last = tmp_path / "checkpoints" / "last"
    step = read_manifest(last)["step"]
    epoch, number = map(int, place.removeprefix("val ").split("."))
    batches = 8 * (epoch + 1) if place.startswith("val") else 8 * epoch + number + 1
    assert step == -(-batches // accumulate)  # not one optimizer step is lost
    assert stopped.value.status == 75 and f"resume={last}" in capfd.readouterr().err
    task, trainer = fit(tmp_path, resume="auto", accumulate_grad_batches=accumulate)
    assert_equal(fingerprint(task, trainer), reference(accumulate))
    assert len(task.seen) == 16 - step * accumulate
    first = 8 // accumulate
    expected = [s for s in (first, 2 * first) if s >= step]
    assert task.validations == expected  # the one that was missed is made up for


@pytest.mark.parametrize("place", ["0.3", "val 0.0", "0.5", "0.7"])
def test_validations_within_an_epoch_are_neither_lost_nor_repeated(tmp_path, place):
    whole = fit(tmp_path / "whole", val_check_interval=4)
    with pytest.raises(Stopped):
        fit(tmp_path / "parts", signals={place: "SIGTERM"}, val_check_interval=4)
    task, trainer = fit(tmp_path / "parts", resume="auto", val_check_interval=4)
    assert_equal(fingerprint(task, trainer), fingerprint(*whole))
    assert whole[0].validations == [4, 8, 12, 16]
    assert task.validations == {"0.3": [4, 8, 12, 16], "val 0.0": [4, 8, 12, 16]}.get(place, [8, 12, 16])


def test_attentions_of_stages_are_compared_one_by_one():
    saved, current = ({"attention": [AGENT, AGENT | {"agent_tokens": n}]} for n in (16, 25))
    match = r"attention agent_attention / agent_attention\(agent_tokens=16\) and not agent_attention / .*=25\)"
    with pytest.raises(ValueError, match=match):
        compare_configs(saved, current)


def test_the_handlers_of_before_are_back_afterwards(tmp_path):
    before = [signal.getsignal(number) for number in Preemption.SIGNALS]
    with pytest.raises(Stopped):
        fit(tmp_path, signals={"0.1": "SIGUSR1"})
    assert [signal.getsignal(number) for number in Preemption.SIGNALS] == before
    fit(tmp_path, resume="auto", epochs=1)
    assert [signal.getsignal(number) for number in Preemption.SIGNALS] == before


def test_one_ctrl_c_saves_and_reports_130(tmp_path):
    with pytest.raises(Stopped, match="stopped by SIGINT at step 3; to go on: resume=") as stopped:
        fit(tmp_path, signals={"0.2": "SIGINT"})
    assert stopped.value.status == 130 and read_manifest(tmp_path / "checkpoints" / "last")["step"] == 3


def test_a_run_that_is_over_ends_at_once_and_can_be_extended(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    whole = fingerprint(*fit(tmp_path / "whole", epochs=3))
    fit(tmp_path / "parts", epochs=2)
    task, trainer = fit(tmp_path / "parts", epochs=2, resume="auto")
    assert task.seen == [] and trainer.global_step == 16
    # nobody is left who would end this process for a signal that is meant for something else
    assert signal.getsignal(signal.SIGTERM) == before and "signals" not in {t.name for t in threading.enumerate()}
    assert_equal(fingerprint(*fit(tmp_path / "parts", epochs=3, resume="auto")), whole)


def test_preemption_needs_a_callback_that_saves():
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[Preemption()])
    with pytest.raises(ValueError, match="Preemption: needs one Checkpoints callback beside it, got 0"):
        trainer.callbacks[0].setup(trainer, None, "fit")


def test_outside_the_main_thread_no_handler_is_touched(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=fit, args=(tmp_path,), kwargs={"max_steps": 1})
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before
    assert read_manifest(tmp_path / "checkpoints" / "last")["step"] == 1


def forked(folder, **keywords):
    """The exit status of the tiny run in a child of this process, which has imported everything."""
    child = os.fork()
    if child == 0:
        try:
            fit(folder, **keywords)
        except Stopped as stopped:
            os._exit(stopped.status)
        else:
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def start(folder, **keywords):
    """The same as a command, which starts others."""
    # bits depend on the number of threads: the same as here, where the uninterrupted run was made
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, str(SCRIPT), str(folder), json.dumps(keywords)]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, check=False).returncode


def test_kill_9_and_ctrl_c_cost_the_steps_since_the_last_checkpoint_and_nothing_else(tmp_path, reference):
    keywords = {"accumulate_grad_batches": 2}
    assert forked(tmp_path, signals={"1.4": "SIGKILL"}, **keywords) == -signal.SIGKILL
    assert latest(tmp_path / "checkpoints").name == "step-00000006"
    assert forked(tmp_path, signals={"1.4": "SIGINT"}, resume="auto", **keywords) == 130
    assert latest(tmp_path / "checkpoints").name == "step-00000007"
    task, trainer = fit(tmp_path, resume="auto", **keywords)
    assert task.seen == [(1, 6), (1, 7)]
    assert_equal(fingerprint(task, trainer), reference(2))


@pytest.mark.slow
@pytest.mark.full
def test_two_processes_stop_together_when_one_is_asked(tmp_path):
    keywords = {"devices": 2, "strategy": "ddp"}
    assert start(tmp_path, signals={"0.4 rank 1": "SIGTERM"}, **keywords) == 75
    assert latest(tmp_path / "checkpoints").name == "step-00000005"
    assert read_manifest(tmp_path / "checkpoints" / "last")["step"] == 5


def test_a_second_ctrl_c_quits_at_once(tmp_path):
    """In a forked child with nothing but the handler."""
    told, done = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            requests = Requests()
            requests.looked_at = True
            for pause in (0, 0, 2 * ECHO):  # what sends it to a group may send it twice
                time.sleep(pause)
                requests._note(signal.SIGINT, None)
                os.write(done, b".")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGINT
    assert os.read(told, 9) == b".."
    os.close(told)
    os.close(done)


def test_step_randomness_depends_on_counters_alone(tmp_path):
    class Module(pl.LightningModule):
        pass

    def draw(epoch, number, seed=3, rank=0):
        trainer = type("Trainer", (), {"global_rank": rank, "distributed_sampler_kwargs": None})
        torch.rand(epoch + number + 1)  # whatever happened before must not matter
        StepRandomness(seed).on_train_batch_start(trainer, Module(), TinyBatch(None, None, epoch, number), 0)
        return torch.rand(1).item(), float(np.random.rand()), random.random()

    assert draw(1, 2) == draw(1, 2)
    others = [draw(1, 2), draw(1, 3), draw(2, 2), draw(1, 2, seed=4), draw(1, 2, rank=1)]
    assert all(len({values[i] for values in others}) == len(others) for i in range(3))


def test_step_randomness_refuses_what_it_cannot_count():
    with pytest.raises(ValueError, match="StepRandomness: seed must be an integer of at least 0, got -1"):
        StepRandomness(-1)
    with pytest.raises(ValueError, match="must be a named tuple with the fields epoch and number, got tuple"):
        StepRandomness(0).on_train_batch_start(None, None, (1, 2), 0)


@pytest.mark.case(16)
@pytest.mark.case(20)
@pytest.mark.case(30)
@pytest.mark.case(13)
def test_a_job_that_is_started_again_goes_on_with_its_own_run(tmp_path, monkeypatch):
    fit(tmp_path / "own", epochs=2)
    fit(tmp_path / "elsewhere", epochs=1)
    monkeypatch.chdir(tmp_path)
    for given, begun, restarts, found in (
        (None, None, "0", None),
        (None, None, "1", 16),
        (None, "auto", "1", None),  # of another command
        ("elsewhere", "elsewhere", "0", 16),  # it has come further than where it began
        ("elsewhere", "other", "0", 8),
        ("elsewhere", "other", "1", 8),
    ):
        for name in RESTARTS:
            monkeypatch.setenv(name, restarts)
        monkeypatch.setattr("models.runs.resume.read_config", lambda path, begun=begun: {"resume": begun})
        path = find_resume(given, tmp_path / "own")
        assert (None if path is None else read_manifest(path)["step"]) == found


def test_find_resume(tmp_path, caplog):
    assert find_resume(None, tmp_path) is None
    with caplog.at_level(logging.DEBUG):
        assert find_resume("auto", tmp_path) is None
    assert "no checkpoint in" in caplog.text
    fit(tmp_path, max_steps=6)
    folder = tmp_path / "checkpoints"
    newest, older = folder / "step-00000006", folder / "step-00000003"
    assert find_resume("auto", tmp_path) == newest.resolve() == find_resume(str(folder / "last"), tmp_path)
    assert find_resume(str(older), tmp_path) == older.resolve()
    with pytest.raises(ValueError, match=r"nothing at this path.*choose one of last.*step-00000006, step-00000003"):
        find_resume(str(folder / "step-00000009"), tmp_path)
    with pytest.raises(ValueError, match=r"a single file holds weights and nothing of the optimizer.*choose one of"):
        find_resume(str(newest / "model.safetensors"), tmp_path)
    with (newest / "trainer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(ValueError, match=r"checksum mismatch in .*trainer\.json"):
        find_resume(str(newest), tmp_path)
    caplog.clear()
    assert find_resume("auto", tmp_path) == older.resolve()
    assert "skipping a damaged checkpoint" in caplog.text
    task, _ = fit(tmp_path, resume="auto", max_steps=6)
    assert task.seen[0] == (0, 3) and find_resume("auto", tmp_path).name == "step-00000006"


AGENT = {"_target_": "models.attention.agent.agent_attention", "agent_tokens": 49}
SAVED = {"model": {"_target_": "models.backbones.swin.Swin", "num_classes": 5}, "attention": AGENT, "lr": 0.1}


def test_configs_that_agree_where_it_matters():
    compare_configs(SAVED, SAVED | {"image_size": 384, "logger": {"name": "csv"}})
    compare_configs(SAVED | {"logger": {"name": "none"}}, SAVED | {"logger": {"name": "csv"}})


@pytest.mark.parametrize("section", ["optimizer", "schedule", "augment", "data", "task"])
def test_other_training_settings_are_named(section):
    saved, current = ({section: {"a": 1, "b": {"c": value}, "list": [1, 2]}} for value in (0.1, 0.5))
    with pytest.raises(ValueError, match=rf"trained with {section}\.b\.c 0\.1 and not 0\.5 as this command asks"):
        compare_configs(saved, current)


def test_what_may_change_in_a_continued_run():
    saved = {"data": {"root": "/a", "workers": 0}, "trainer": {"max_epochs": 2}, "task": {"compile": False, "x": 1}}
    current = {"data": {"root": "/b", "workers": 4}, "trainer": {"max_epochs": 9}, "task": {"compile": True, "x": 1}}
    compare_configs(saved, current)


@pytest.mark.case(26)
@pytest.mark.case(27)
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model": SAVED["model"] | {"num_classes": 7}}, "with model.num_classes 5 and not 7 as this command asks"),
        ({"model": {"_target_": "models.backbones.vit.ViT", "num_classes": 5}}, "with model Swin and not ViT as this"),
        ({"attention": AGENT | {"agent_tokens": 16}}, r"agent_attention\(agent_tokens=49\) and not .*agent_tokens=16"),
        (
            {"attention": {"_target_": "models.attention.softmax.softmax_attention"}},
            "agent_attention and not softmax_at",
        ),
        ({"attention": {"_target_": "x.alibi", "slope": 1}}, "agent_attention and not alibi as this"),
        ({"attention": [AGENT, AGENT]}, "attention agent_attention and not agent_attention / agent_attention as"),
    ],
)
def test_configs_that_do_not_fit_are_named(change, match):
    with pytest.raises(ValueError, match=match):
        compare_configs(SAVED, SAVED | change)
