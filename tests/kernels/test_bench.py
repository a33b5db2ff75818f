"""The benchmark: what is counted, how rows and tables come out of measurements, and what the command line refuses."""

import itertools
import json

import pytest
import torch
from torch import Tensor

import kernels
from kernels.bench import command, targets
from kernels.bench.calls import call_of
from kernels.bench.checking import problems
from kernels.bench.counting import Counted, count
from kernels.bench.environment import Budget
from kernels.bench.report import Report, timed_table
from kernels.bench.rows import counted_row, timed_row
from kernels.bench.targets import Target, caps_of_stages, target_of
from kernels.bench.timing import Ceilings, Spread, measure
from kernels.operation import Cost, Operation

OPERATIONS = {o.name: o for module in kernels.OPERATIONS for o in kernels.operations_of(module)}
CEILINGS = Ceilings(bandwidth=4e12, matrix_rate=8e14)


def counted(function, *tensors: Tensor, part: str = "forward") -> Counted:
    """Of a function of fake copies of these tensors."""

    def prepare():
        fakes = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, requires_grad=t.requires_grad) for t in tensors
        ]
        return call_of(part, lambda **given: function(*given.values()), {str(i): t for i, t in enumerate(fakes)})

    return count(prepare)


# Counting


def test_an_operator_reads_its_inputs_and_writes_its_result():
    x = torch.empty(4, 8)
    # x * 2: 128 read, 128 written; the sum: 128 read, 16 written; both results live at the end of the sum
    assert counted(lambda x: (x * 2).sum(-1), x) == Counted(bytes=400, peak=144, kernels=2, flops=0)


def test_the_same_tensor_is_read_once_and_an_expanded_one_too():
    x, row = torch.empty(4, 8), torch.empty(8)
    assert counted(lambda x: x * x, x).bytes == 256
    assert counted(lambda x, row: x + row.expand(4, 8), x, row).bytes == 128 + 32 + 128


def test_views_and_new_memory_cost_nothing_but_space():
    x = torch.empty(4, 8)
    assert counted(lambda x: x.t().unflatten(0, (2, 4))[1:, 2].detach(), x) == Counted(0, 0, 0, 0)
    assert counted(lambda x: x.new_empty(100), x) == Counted(0, 400, 0, 0)
    assert counted(lambda x: x.t().contiguous(), x) == Counted(256, 128, 1, 0)


def test_in_place_reads_and_writes_and_a_copy_only_writes():
    x, y = torch.empty(4, 8), torch.empty(4, 8)
    assert counted(lambda x, y: x.add_(y), x, y) == Counted(3 * 128, 0, 1, 0)
    assert counted(lambda x, y: x.copy_(y), x, y) == Counted(2 * 128, 0, 1, 0)
    assert counted(lambda x: x.zero_(), x) == Counted(128, 0, 1, 0)


def test_what_is_selected_is_read_and_not_the_rest():
    x, rows = torch.empty(100, 8), torch.empty(4, dtype=torch.int64)
    assert counted(lambda x, rows: x[rows], x, rows).bytes == 32 + 128 + 128


def test_what_is_freed_is_held_no_longer():
    x = torch.empty(4, 8)
    assert counted(lambda x: x.exp().exp().exp().exp(), x).peak == 2 * 128


def test_backward_holds_what_forward_saved():
    x = torch.empty(4, 8, requires_grad=True)
    # sin and exp: 256 each. Backward: exp reads its result and the gradient, sin the input and a gradient through cos
    found = counted(lambda x: x.sin().exp(), x, part="training")
    assert found == Counted(bytes=2 * 256 + 384 + 256 + 384, peak=4 * 128, kernels=5, flops=0)


def test_flops_of_a_grouped_convolution_do_not_grow_with_its_groups():
    x, weight = torch.empty(2, 8, 5, 5, requires_grad=True), torch.empty(8, 1, 3, 3, requires_grad=True)

    def convolve(x, weight):
        return torch.nn.functional.conv2d(x, weight, padding=1, groups=8)

    forward = 2 * 2 * 8 * 25 * 9
    assert counted(convolve, x, weight).flops == forward
    assert counted(convolve, x, weight, part="training").flops == 3 * forward


def test_work_that_depends_on_numbers_is_not_counted():
    assert counted(lambda x: x[: int(x.sum().item())], torch.empty(4)) is None


def test_launches_count_with_what_they_touch():
    """3×3 convolution of 16 tokens × 16 channels: one copy that transposes the weights, one launch."""
    shape = {"batch": 1, "grid": (4, 4), "dim": 16}
    operation = OPERATIONS["depthwise_conv"]
    small = Operation(**{**vars(operation), "stages": {"small": shape}})
    forward = counted_row(small, "small", torch.float32).counted["fused"]["forward"]
    tokens, weights, bias = 16 * 16 * 4, 16 * 9 * 4, 16 * 4
    assert forward.kernels == 2
    assert forward.bytes == 2 * weights + 2 * tokens + weights + bias
    assert forward.peak == tokens + weights
    assert forward.flops == 2 * 16 * 16 * 9


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_fused_moves_no_more_than_the_authors_way(operation):
    """A gate: what the launches touch, forward and with backward, at the first of the papers' stages."""
    baselines = {name: f for name, f in operation.baselines.items() if name == "official"}
    row = counted_row(
        Operation(**{**vars(operation), "baselines": baselines}), next(iter(operation.stages)), torch.bfloat16
    )
    fused = row.counted["fused"]
    for part in ("forward", "training"):
        if fused[part] is None:
            continue
        assert 0 < fused[part].bytes <= row.counted.get("official", fused)[part].bytes
        assert fused[part].bytes >= 0.9 * row.least_bytes(part), "the fused model says more than is moved"


# An operation that needs no kernel, and a timer that needs no GPU


def doubled(x: Tensor, backend: str = "auto") -> Tensor:
    return 2 * x


def operation_of(run=doubled, definition=lambda x: 2 * x, **baselines) -> Operation:
    def either(x: Tensor, backend: str = "auto") -> Tensor:
        return definition(x) if backend == "torch" else run(x, backend)

    def inputs(device, dtype, seed=0, *, batch):
        generator = torch.Generator(device).manual_seed(seed)
        return {"x": torch.randn(batch, 8, generator=generator, device=device).to(dtype).requires_grad_()}

    def cost(itemsize, *, batch):
        return Cost(16 * batch * itemsize, 16 * batch * itemsize, 8 * batch, 8 * batch)

    stages = {"224 px": {"batch": 4}, "1024 px": {"batch": 2}}
    return Operation("doubled", either, inputs, stages, stages, cost, {"official": doubled, **baselines})


class FakeTimer:
    """Calls once; the times are 1, 2, 3 ... ms in the order of the calls, replays of graphs take half a millisecond."""

    def __init__(self):
        self.times = itertools.count(1)

    def time(self, function) -> Spread:
        function()
        median = float(next(self.times))
        return Spread(median, median - 0.5, median + 0.5)

    def graph(self, function) -> Spread:
        function()
        return Spread(0.5, 0.4, 0.6)

    def peak(self, function) -> int:
        function()
        return 2**20


def row_of(operation: Operation, **options):
    return timed_row(operation, "224 px", torch.bfloat16, FakeTimer(), compiled=False, device="cpu", **options)


def test_a_row_has_the_times_of_every_way():
    row = row_of(operation_of())
    assert (row.wrong, list(row.timed)) == ([], ["fused", "official"])
    assert row.timed["fused"].training == Spread(2.0, 1.5, 2.5)
    assert row.milliseconds("official", "forward") == 3
    assert (row.times_faster("official", "forward"), row.times_faster("official", "training")) == (3, 2)
    assert row.memory_share() == 1
    assert row.bandwidth_share("forward", CEILINGS) == 16 * 4 * 2 / 1e-3 / 4e12


def test_a_fused_operation_is_checked_and_timed():
    operation = OPERATIONS["depthwise_conv"]
    small = Operation(**{**vars(operation), "stages": {"small": {"batch": 1, "grid": (4, 4), "dim": 16}}})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    row = timed_row(small, "small", torch.float16, FakeTimer(), compiled=False, device=device)
    assert (row.wrong, list(row.timed)) == ([], ["fused", "official", "pytorch"])
    assert all(m.training and not m.note for m in row.timed.values())


def test_dense_attention_is_compared_by_its_fastest_backend():
    def attention(x):
        return torch.nn.functional.scaled_dot_product_attention(*[x[:, None, None]] * 3)

    row = row_of(operation_of(sdpa=attention))
    assert {"sdpa flash", "sdpa cudnn", "sdpa efficient"} < set(row.timed)
    ran = [n for n, m in row.timed.items() if n.startswith("sdpa") and m.training]
    assert row.fastest("sdpa", "training") in ran
    assert all(m.note for n, m in row.timed.items() if n not in ran and n.startswith("sdpa"))


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (torch.OutOfMemoryError("4 GiB"), "out of memory"),
        (RuntimeError("no kernel\nat all"), "RuntimeError: no kernel"),
    ],
)
def test_a_baseline_that_fails_is_a_note(error, note):
    def fail(x):
        raise error

    row = row_of(operation_of(pytorch=fail))
    assert row.timed["pytorch"].note == note
    assert row.times_faster("pytorch", "training") is None
    assert f"| {note} |" in timed_table([row], CEILINGS)[2]


def test_a_call_that_no_graph_can_hold_is_timed_without(monkeypatch):
    def refuse(self, function):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(FakeTimer, "graph", refuse)
    found = measure(lambda x: 2 * x, {"x": torch.ones(2, requires_grad=True)}, FakeTimer())
    assert (found.training.median, found.training_graph) == (2, None)
    assert found.note.startswith("no CUDA graph of forward: RuntimeError: operation not permitted")


def test_without_gradients_only_forward_is_timed():
    found = measure(lambda x: 2 * x, {"x": torch.ones(2)}, FakeTimer())
    assert (found.forward.median, found.training, found.note) == (1, None, "")


def test_a_wrong_operation_is_not_timed():
    row = row_of(operation_of(lambda x, backend: 2.1 * x))
    assert row.timed == {}
    assert row.wrong[0] == "output 0 in float32: error 5.0e-02, at most 1.0e-05"
    assert "gradient of x in bfloat16" in row.wrong[-1]
    assert "not timed: output 0 in float32" in timed_table([row], CEILINGS)[2]


def test_results_that_change_and_memory_that_is_not_written_are_found():
    calls = itertools.count()

    def drift(x, backend):
        return 2 * x + next(calls) * 1e-7

    def unwritten(x, backend):
        out = torch.empty_like(x, requires_grad=False)
        return torch.where(torch.arange(8) < 7, 2 * x, out)

    shape = {"batch": 2}
    assert "output 0 in float32: not the same twice" in problems(operation_of(drift), shape, torch.float32, "cpu")
    assert problems(operation_of(unwritten), shape, torch.float32, "cpu")[0].startswith(
        "output 0 in float32: error inf"
    )
    assert problems(operation_of(), shape, torch.float16, "cpu") == []


def test_choices_may_differ_where_rounding_decides_and_nowhere_else():
    def chosen(x, backend="auto"):
        return (x > 0).long()

    def other(x, backend):
        return (x < 0).long()

    assert problems(operation_of(chosen, chosen), {"batch": 2}, torch.bfloat16, "cpu") == []
    wrong = problems(operation_of(other, chosen), {"batch": 2}, torch.bfloat16, "cpu")
    assert wrong[0] == "output 0 in float32: error 1.0e+00, at most 1.0e-03"


# Targets


@pytest.mark.parametrize("name", OPERATIONS)
def test_targets_are_of_stages_that_exist_and_no_single_images(name):
    """If stages have changed: python -m kernels.compile --caps."""
    batches = {stage: shape["batch"] for stage, shape in OPERATIONS[name].stages.items()}
    known = caps_of_stages().get(name, {})
    assert known and set(known) <= {stage for stage, batch in batches.items() if batch > 1}
    for stage, batch in batches.items():
        assert (target_of(name, stage, batch) is None) == (stage not in known)


def test_no_target_is_above_what_full_issue_leaves_room_for():
    for stages in caps_of_stages().values():
        for caps in stages.values():
            assert 0 < caps["bandwidth"] <= 0.85 and caps["bandwidth"] <= caps["cap"] <= 1


def test_targets_are_the_caps_of_a_stage_and_leave_out_single_images(monkeypatch):
    caps = {"bandwidth": 0.4, "cap": 0.6, "official forward": 8.0, "official training": 15.0, "memory": 0.2}
    monkeypatch.setattr(targets, "caps_of_stages", lambda: {"op": {"224 px": caps}})
    assert str(target_of("op", "224 px", 128)) == "official 8/15, memory 1/4.5, bandwidth 40%"
    assert target_of("op", "224 px", 1) is None
    assert target_of("op", "9 px", 128) is None
    assert target_of("doubled", "224 px", 128) is None


def test_what_misses_its_target_is_named():
    row = row_of(operation_of())
    row.target = Target(forward=2, training=4, memory=1 / 3)
    assert row.missed(CEILINGS) == ["official training 2 < 4", "memory 1 < 3"]


# Reports


def test_a_report_is_markdown_and_json_and_overwrites_nothing(tmp_path):
    environment = {"date": "2026-01-02", "device": "NVIDIA H200"}
    for name in ("2026-01-02-nvidia-h200", "2026-01-02-nvidia-h200-2"):
        report = Report(environment, CEILINGS, tmp_path)
        report.add(row_of(operation_of()))
        assert report.path.name == name
    data = json.loads((tmp_path / f"{name}.json").read_text())
    assert data == json.loads(json.dumps(report.as_dict()))
    assert data["rows"][0]["timed"]["fused"]["training"] == [2.0, 1.5, 2.5]
    text = (tmp_path / f"{name}.md").read_text()
    assert "- measured ceilings: copy 4.00 TB/s, bfloat16 product 800 TFLOP/s" in text
    header, _, line = text.splitlines()[-3:]
    assert dict(zip(header.split(" | "), line.split(" | "), strict=True)) | {"| stage": "", "missed |": ""} == {
        "| stage": "", "ms": "1.000 / 2.000", "CUDA graph ms": "0.500 / 0.500", "launch tax ms": "0.500 / 1.500",
        "peak MiB": "1 / 1", "of copy bandwidth": "0% / 0%", "of matrix rate": "0% / 0%",
        "official/fused": "3.00 / 2.00", "compiled/fused": "-", "pytorch/fused": "-", "dense sdpa/fused": "-",
        "official/fused memory": "1.0", "wanted": "-", "missed |": "",
    }  # fmt: skip


# The command line


@pytest.fixture
def bench(monkeypatch, capsys):
    """`bench("depthwise_conv", "--quick") -> (exit status, output, errors)`, as on a machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(*arguments: str):
        try:
            status = command.main(list(arguments))
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return run


def test_without_a_gpu_it_counts(bench, tmp_path):
    status, output, _ = bench("depthwise_conv", "--quick", "--output", str(tmp_path))
    assert status == 0
    assert "no GPU: kernels are not timed" in output
    assert "| k3 224 px stage 1 | 147 / 368 |" in output
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text())["rows"][0]["counted"]["official"]["forward"]["kernels"] == 5


def test_counts_are_the_same_every_time_and_written_only_where_asked(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    first, second = (bench("depthwise_conv", "--stage", "one image")[1] for _ in range(2))
    assert first == second
    assert not list(tmp_path.iterdir())


def test_a_failed_check_is_the_exit_status(bench, monkeypatch):
    def failed(operation, stage, dtype):
        row = counted_row(operation, stage, dtype)
        row.wrong = ["output 0: wrong"]
        return row

    monkeypatch.setattr(command, "counted_row", failed)
    assert bench("depthwise_conv", "--quick")[0] == 1


def test_a_spent_budget_starts_nothing_more(bench, monkeypatch):
    clock = itertools.count(0, 10)
    monkeypatch.setattr(command, "Budget", lambda seconds: Budget(seconds, lambda: next(clock)))
    status, output, _ = bench("depthwise_conv", "--stage", "k3 224 px stage", "--budget", "25")
    assert status == 0
    assert "| k3 224 px stage 2 |" in output
    assert "\n| k3 224 px stage 3 |" not in output
    assert "the budget of 25 s was spent; left out: depthwise_conv, k3 224 px stage 3; depthwise_conv" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["atention"], "no operation is called atention; choose from agent_attention"),
        (
            ["depthwise_conv", "--stage", "9 px"],
            "no stage has this in its name, got 9 px; choose from k3 224 px stage 1",
        ),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--budget", "0"], "must be more than 0, got 0"),
        (["--model", "vit_32px", "--batch", "0"], "must be at least 1, got 0"),
        (["depthwise_conv", "--model", "vit_32px"], "takes operations or --model, got both; give one of them"),
    ],
)
def test_wrong_arguments_are_one_error(bench, arguments, message):
    status, _, errors = bench(*arguments)
    assert (status, message in errors) == (2, True), errors


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_checks_and_times(tmp_path):
    arguments = ["depthwise_conv", "--stage", "one image", "--output", str(tmp_path)]
    assert command.main(arguments) == 0
    (file,) = tmp_path.glob("*.json")
    timed = json.loads(file.read_text())["rows"][0]["timed"]
    assert set(timed) == {"fused", "official", "pytorch", "official compiled"}
    assert all(way["forward"][0] > 0 and way["training_peak"] > 0 for way in timed.values())
    assert timed["fused"]["training_graph"]
