"""What a training costs on many GPUs: the properties of the formula, and the probe that prints it."""

import csv

import pytest

from models.scaling import Machine, step_of

MACHINE = Machine(node=8, inside=400.0, between=50.0, core_images=440.0, cores=16, launches=0.0)
SIZE = 25_000_000


def test_a_step_is_the_batch_over_the_speed_where_nothing_else_takes_longer():
    step = step_of(8, 1024, 128, 2000.0, SIZE, MACHINE)
    assert step.images == 128 and step.limit == "compute"
    assert step.seconds == pytest.approx(128 / 2000)
    assert step.reduce == pytest.approx(2 * 7 / 8 * 4 * SIZE / 400e9)


def test_summing_between_machines_is_hidden_behind_the_backward_pass_or_is_the_limit():
    slow = MACHINE._replace(between=0.1)
    step = step_of(64, 1024, 128, 2000.0, SIZE, slow)
    across = 2 * 7 / 8 * 4 * SIZE / (8 * 0.1e9)
    assert step.reduce == pytest.approx(across + 2 * 7 / 8 * 4 * SIZE / 400e9)
    assert step.limit == "all-reduce" and step.seconds == pytest.approx(step.reduce + step.compute / 3)


def test_the_host_launches_every_pass_anew():
    step = step_of(1, 1024, 128, 2000.0, SIZE, MACHINE._replace(launches=0.03))
    assert step.launches == pytest.approx(8 * 0.03) and step.limit == "compute"
    assert step_of(64, 1024, 128, 2000.0, SIZE, MACHINE._replace(launches=0.03)).limit == "launches"


def test_a_loader_with_few_cores_is_the_step():
    step = step_of(8, 1024, 128, 2000.0, SIZE, MACHINE._replace(cores=1))
    assert step.limit == "loader" and step.seconds == pytest.approx(128 / 440)


def test_the_probe_gives_a_row_per_number_of_gpus(command, tmp_path):
    given = ("probe=scale", "model=vit_32px", "data=fake", "output=found")
    status, _, errors = command("eval", *given)
    assert status == 2 and "scale: images_per_second of one GPU must be given" in errors
    status, printed, errors = command("eval", *given, "probe.images_per_second=3000", "probe.gpus=[1,8,2048]")
    assert status == 0, errors
    assert "computed, not measured" in printed and "2048 GPUs: more than the 1024 images of a step" in printed
    rows = list(csv.DictReader(next(tmp_path.glob("found/**/scale.csv")).open()))
    assert [row["gpus"] for row in rows] == ["1", "8"]
    assert float(rows[0]["hours"]) == pytest.approx(300 * 1251 * 1024 / 3000 / 3600)
    status, _, errors = command("eval", *given, "probe.images_per_second=3000", "probe.gpus=[0]")
    assert status == 2 and "scale: gpus must be a whole number of at least 1, got 0" in errors
