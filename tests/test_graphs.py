"""`GraphedStep`: on a CPU with a stand-in for the capture, on a GPU with CUDA graphs."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastconv
from fastconv.graphs import CaptureError, GraphedStep, step


@pytest.fixture
def rehearsed(monkeypatch):
    """A CPU in the place of a GPU, and a function in the place of its graph; the warm-ups of each capture."""
    counts = []

    def capture(function, device, warm_ups):
        counts.append(warm_ups)
        for _ in range(warm_ups):
            function()
        return function

    monkeypatch.setattr(step, "GRAPHABLE", "cpu")
    monkeypatch.setattr(step, "capture", capture)
    return counts


class Net(nn.Module):
    """Batch norm has buffers that a step changes, and dropout draws random numbers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.4), nn.Flatten(), nn.Linear(54, 4)
        )

    def forward(self, x):
        return self.layers(x)


def batches(count, images=7, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(images, 3, 5, 5, generator=generator)
        yield x.to(device), torch.randint(4, (images,), generator=generator).to(device)


def adamw(parameters, **settings):
    """Fused, it also runs on a CPU with `capturable`."""
    return torch.optim.AdamW(parameters, lr=0.03, fused=True, capturable=True, **settings)


def make(optimizer=adamw, model=None, loss=F.cross_entropy, images=7):
    """A model, its optimizer and its graphed step."""
    model = Net() if model is None else model
    optimizer = optimizer(model.parameters())
    return model, optimizer, GraphedStep(model, loss, optimizer, next(batches(1, images)))


def eager(model, optimizer, x, labels, autocast=False):
    optimizer.zero_grad()
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=autocast):
        loss = F.cross_entropy(model(x), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def tensors(model, optimizer):
    """All that training changes, with names."""
    found = dict(model.state_dict())
    for i, state in optimizer.state_dict()["state"].items():
        found |= {f"{i}.{name}": x for name, x in state.items() if isinstance(x, torch.Tensor)}
    return {name: x.clone() for name, x in found.items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert torch.equal(x, expected[name]), name


def assert_steps_equal(optimizer, model, first=0, autocast=False, device="cpu", steps=4):
    """Losses, weights, buffers and state after each step are those of eager steps, bit for bit.

    Args:
        first: eager steps before the graph is made.
    """
    model = model.to(device)
    other = copy.deepcopy(model)
    optimizer, others = optimizer(model.parameters()), optimizer(other.parameters())
    data = [*batches(first + steps, device=device)]
    for batch in data[:first]:
        for each, its_optimizer in ((model, optimizer), (other, others)):
            torch.manual_seed(2)
            eager(each, its_optimizer, *batch)
    torch.manual_seed(3)
    expected = []
    for batch in data[first:]:
        loss = eager(other, others, *batch, autocast)
        expected.append({"loss": loss, **tensors(other, others)})
    torch.manual_seed(3)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        graphed = GraphedStep(model, F.cross_entropy, optimizer, data[-1])
        # Here, where autocast caches what it rounds.
        for batch, after in zip(data[first:], expected, strict=True):
            loss = graphed(*batch)
            assert_equal({"loss": loss, **tensors(model, optimizer)}, after)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def capturable(name, **settings):
    return lambda parameters: getattr(torch.optim, name)(parameters, capturable=True, **settings)


OPTIMIZERS = {
    "AdamW": adamw,
    "Adam": lambda parameters: torch.optim.Adam(parameters, fused=True, capturable=True, amsgrad=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD without momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "Adadelta": capturable("Adadelta"),
    "Adamax": capturable("Adamax"),
    "NAdam": capturable("NAdam"),
    "RAdam": capturable("RAdam"),
    "RMSprop": capturable("RMSprop", momentum=0.9, centered=True),
}


@pytest.fixture
def capturable_on_a_cpu(monkeypatch):
    for name in ("adadelta", "adamax", "nadam", "radam", "rmsprop", "rprop"):
        module = sys.modules[f"torch.optim.{name}"]
        monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda *_, **__: ["cpu"])


@pytest.mark.parametrize("first", [0, 1], ids=["new", "after an eager step"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_equal_eager_ones(rehearsed, capturable_on_a_cpu, optimizer, first):
    assert_steps_equal(OPTIMIZERS[optimizer], Net(), first)


def test_muon(rehearsed):
    model = nn.Sequential(nn.Flatten(), nn.Linear(75, 4, bias=False))
    assert_steps_equal(lambda parameters: torch.optim.Muon(parameters, lr=0.1), model)


@pytest.mark.parametrize("module", [fastconv.Classifier, fastconv.reference.Classifier])
def test_classifiers(rehearsed, module):
    assert_steps_equal(adamw, module(width=4, depth=1, patch=1, num_classes=4), steps=2)


class Float32Head(Net):
    """Its last layer has no autocast, forward and backward."""

    def forward(self, x):
        x = self.layers[:-1](x)
        with torch.autocast(x.device.type, enabled=False):
            return self.layers[-1](x.float())


def test_autocast_that_is_on_at_the_construction(rehearsed):
    assert_steps_equal(adamw, Float32Head(), autocast=True)


def test_a_scheduler_that_fills_a_learning_rate(rehearsed):
    model = Net()
    other = copy.deepcopy(model)
    runs = []
    for each in (model, other):
        optimizer = torch.optim.AdamW(each.parameters(), lr=torch.tensor(0.03), fused=True, capturable=True)
        runs.append((optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)))
    (optimizer, scheduler), (others, its_scheduler) = runs
    graphed = GraphedStep(model, F.cross_entropy, optimizer, next(batches(1)))
    for batch in batches(3):
        torch.manual_seed(0)
        loss = graphed(*batch)
        scheduler.step()
        torch.manual_seed(0)
        assert torch.equal(loss, eager(other, others, *batch))
        its_scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.03 / 8
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"].clone()
    with pytest.raises(CaptureError, match="lr of the optimizer's group 0 was changed"):
        graphed(*batch)


def test_a_hook_that_clips_gradients(rehearsed):
    def optimizer(parameters):
        clipped = list(parameters)
        made = adamw(clipped)

        def clip(*_):
            nn.utils.clip_grad_norm_(clipped, 0.1)

        made.register_step_pre_hook(clip)
        return made

    assert_steps_equal(optimizer, Net())


def test_a_second_graph_for_the_last_batch(rehearsed):
    model, optimizer, graphed = make()
    *whole, last = [*batches(3), *batches(1, images=4)]
    other = copy.deepcopy(model)
    others = adamw(other.parameters())
    smaller = GraphedStep(model, F.cross_entropy, optimizer, last)
    torch.manual_seed(4)
    for batch in whole:
        eager(other, others, *batch)
    expected = eager(other, others, *last)
    torch.manual_seed(4)
    for batch in whole:
        graphed(*batch)
    assert torch.equal(smaller(*last), expected)
    assert_equal(tensors(model, optimizer), tensors(other, others))


def test_an_expanded_buffer_and_an_earlier_gradient(rehearsed):
    model = Net()
    model.register_buffer("positions", torch.arange(3.0).expand(4, 3))
    model.layers[0].weight.grad = torch.ones_like(model.layers[0].weight)
    assert_steps_equal(adamw, model)


class Wait(torch.autograd.Function):
    """Reads a value in the backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * grad.sum().item()


def cross_entropy_of(function):
    return lambda logits, labels: F.cross_entropy(function(logits), labels)


# What a loss does, and the operator that the error names.
WAITING = {
    ".item()": (lambda x: x * x.sum().item(), "_local_scalar_dense"),
    "if": (lambda x: x if x.sum() > 0 else -x, "_local_scalar_dense"),
    "nonzero": (lambda x: x * len(x.nonzero()), "nonzero"),
    "mask": (lambda x: x + x[x > 0].sum(), "index.Tensor"),
    "masked_select": (lambda x: x + x.masked_select(x > 0).sum(), "masked_select"),
    "unique": (lambda x: x + x.unique().sum(), "_unique2"),
    "equal": (lambda x: x * torch.equal(x, x), "equal"),
    "repeat_interleave": (
        lambda x: x + x.repeat_interleave(torch.ones(7, dtype=torch.int64), 0),
        "repeat_interleave",
    ),
    "in the backward": (Wait.apply, "_local_scalar_dense"),
}


@pytest.mark.parametrize("name", WAITING)
def test_waiting_for_a_result_is_refused_and_undone(rehearsed, name):
    function, operator = WAITING[name]
    assert_refused(f"calls aten.{operator}.* on cpu, and the host waits", loss=cross_entropy_of(function))


NOT_WAITING = {
    "where": lambda x: torch.where(x > 0, x, 2 * x),
    "index": lambda x: x[torch.arange(7)],
    "assignment by a mask": lambda x: x.clone().index_put_((x > 0,), torch.zeros(())),
    "repeat_interleave": lambda x: x.repeat_interleave(torch.ones(7, dtype=torch.int64), 0, output_size=7),
}


@pytest.mark.parametrize("name", NOT_WAITING)
def test_results_that_stay_on_the_device_are_taken(rehearsed, name):
    make(loss=cross_entropy_of(NOT_WAITING[name]))


def random_states():
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]


def assert_refused(message, optimizer=adamw, model=None, loss=F.cross_entropy, device="cpu"):
    """The constructor raises CaptureError, and leaves weights, optimizer, gradients and random states alone."""
    model = (Net() if model is None else model).to(device)
    optimizer = optimizer(model.parameters())
    gradients = [torch.ones_like(p) for p in model.parameters()]
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        p.grad = gradient
    before, random = tensors(model, optimizer), random_states()
    groups = copy.deepcopy(optimizer.param_groups)
    with pytest.raises(CaptureError, match=message):
        GraphedStep(model, loss, optimizer, next(batches(1, device=device)))
    assert_equal(tensors(model, optimizer), before)
    assert all(map(torch.equal, random_states(), random))
    for group, was in zip(optimizer.param_groups, groups, strict=True):
        assert group.keys() == was.keys()
        assert all(group[key] == was[key] for key in group if key != "params")
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert p.grad is gradient
        assert gradient.eq(1).all()


def test_a_failing_capture_leaves_everything_as_it_was(rehearsed, monkeypatch):
    def capture(function, device, warm_ups):
        function()
        raise CaptureError("CUDA refuses")

    monkeypatch.setattr(step, "capture", capture)
    assert_refused("CUDA refuses")


def test_a_buffer_that_the_forward_replaces_is_refused(rehearsed):
    class Counting(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls = self.calls + 1
            return super().forward(x)

    assert_refused("model.calls was replaced by the step itself; expected changes .* in place", model=Counting())


class Replacing(torch.optim.SGD):
    """Has new tensors in its state after each step."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p]["average"] = self.state[p].get("average", 0) + p.grad


def replacing_after_an_eager_step(parameters):
    parameters = list(parameters)
    made = Replacing(parameters, lr=0.1)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    made.step()
    return made


class Counter(torch.optim.SGD):
    """Counts steps in Python, in its state or its group."""

    where = "state"

    def step(self, closure=None):
        group = self.param_groups[0]
        for each in [group] if self.where == "group" else [self.state[p] for p in group["params"]]:
            each["count"] = each.get("count", 0) + 1
        super().step(closure)


def counting_in_its_group(parameters):
    made = Counter(parameters, lr=0.1)
    made.where, made.param_groups[0]["count"] = "group", 0
    return made


def with_a_learning_rate_elsewhere(parameters):
    made = adamw(parameters)
    made.param_groups[0]["lr"] = torch.empty((), device="meta")
    return made


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (
            lambda p: torch.optim.Adam(p),
            r"Adam counts its steps on the CPU; expected Adam\(..., capturable=True\)",
        ),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1), "SGD with dampening makes new state"),
        (capturable("Rprop"), "Rprop makes new state in a step, .* take an eager step before"),
        (replacing_after_an_eager_step, "Replacing makes new state in a step, .* changed in place"),
        (lambda p: Counter(p, lr=0.1), "Counter keeps count, of type int; expected tensors on cpu"),
        (counting_in_its_group, "count of the optimizer's group 0 was changed .* by the step itself"),
        (lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1)), "calls aten._local_scalar_dense"),
    ],
)
def test_optimizers_that_no_graph_repeats_are_refused(rehearsed, capturable_on_a_cpu, optimizer, message):
    assert_refused(message, optimizer)


def test_a_hyperparameter_on_another_device_is_refused(rehearsed):
    with pytest.raises(
        CaptureError, match=r"lr of the optimizer's group 0 is float32 \[\] on meta; expected a number"
    ):
        make(with_a_learning_rate_elsewhere)


def test_an_eager_step_makes_the_state_of_any_optimizer_known(rehearsed, capturable_on_a_cpu):
    assert_steps_equal(capturable("Rprop"), Net(), first=1)


def test_a_cpu_is_refused():
    with pytest.raises(CaptureError, match=r"layers.0.weight is on cpu; expected all on one GPU, .* call forward"):
        make()


def test_several_devices_are_refused(rehearsed, monkeypatch):
    monkeypatch.setattr(step, "GRAPHABLE", "meta")
    model = nn.Linear(2, 2, device="meta")
    with pytest.raises(CaptureError, match=r"model.weight is on meta and batch\[0\] is on cpu"):
        GraphedStep(model, F.cross_entropy, torch.optim.SGD(model.parameters()), (torch.ones(1, 2),))


@pytest.fixture
def parallel(tmp_path):
    """A DistributedDataParallel of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield nn.parallel.DistributedDataParallel(Net())
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel_over_gloo_is_refused(rehearsed, parallel):
    with pytest.raises(CaptureError, match="averaged by gloo, which takes them through the CPU; expected"):
        make(model=parallel)


def test_steps_of_distributed_data_parallel_equal_eager_ones(rehearsed, parallel, monkeypatch):
    """Rehearsed over gloo: its messages are as NCCL's."""
    monkeypatch.setattr(step, "_check_messages", lambda *_: None)
    other = copy.deepcopy(parallel.module)
    optimizer, others = adamw(parallel.parameters()), adamw(other.parameters())
    torch.manual_seed(3)
    expected = [eager(other, others, *batch) for batch in batches(4)]
    torch.manual_seed(3)
    graphed = GraphedStep(parallel, F.cross_entropy, optimizer, next(batches(1)))
    assert [graphed(*batch) for batch in batches(4)] == expected
    assert_equal(tensors(parallel.module, optimizer), tensors(other, others))
    assert rehearsed == [11]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.ones(2, 3), r"batch is float32 \[2, 3\] on cpu; expected a sequence of tensors"),
        ((torch.ones(2, 3), 1), r"batch\[1\] is of type int; expected a tensor"),
        ((), "batch is empty; expected a sequence of tensors"),
    ],
)
def test_examples_that_are_no_tensors_are_refused(rehearsed, batch, message):
    model = Net()
    with pytest.raises(TypeError, match=message):
        GraphedStep(model, F.cross_entropy, adamw(model.parameters()), batch)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda y, labels: None,
            "the loss is of type NoneType; expected a scalar tensor that depends on parameters",
        ),
        (lambda y, labels: y.sum(0), r"the loss is float32 \[4\] on cpu; expected a scalar"),
        (lambda y, labels: y.detach().sum(), r"the loss is float32 \[\] on cpu; expected a scalar"),
    ],
    ids=["none", "vector", "constant"],
)
def test_losses_that_cannot_be_differentiated_are_refused(rehearsed, loss, message):
    with pytest.raises(TypeError, match=message):
        make(loss=loss)


def test_an_optimizer_that_needs_a_closure_is_refused(rehearsed):
    with pytest.raises(CaptureError, match="LBFGS calls a closure as often as it decides"):
        make(torch.optim.LBFGS)


def test_it_can_be_made_where_gradients_are_off(rehearsed):
    torch.manual_seed(0)
    with torch.no_grad():
        model, _, step = make()
        loss = step(*next(batches(1)))
    torch.manual_seed(0)
    other, _, other_step = make()
    assert torch.equal(other_step(*next(batches(1))), loss)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, y: (x,), TypeError, "got 1 tensors; expected 2"),
        (lambda x, y: (x, 3), TypeError, r"batch\[1\] is of type int; expected a tensor"),
        (
            lambda x, y: (x[:4], y[:4]),
            ValueError,
            r"float32 \[4, 3, 5, 5\] on cpu; expected float32 \[7, 3, 5, 5\]",
        ),
        (lambda x, y: (x.double(), y), ValueError, r"batch\[0\] is float64 .* drop a smaller last batch"),
        (lambda x, y: (x, y.to("meta")), ValueError, r"batch\[1\] is int64 \[7\] on meta"),
    ],
)
def test_another_kind_of_batch_is_refused(rehearsed, change, error, message):
    _, _, graphed = make()
    with pytest.raises(error, match=message):
        graphed(*change(*next(batches(1))))


def replace_a_parameter(model, optimizer):
    model.layers[4].bias = nn.Parameter(torch.zeros(4))


def move_a_parameter(model, optimizer):
    model.layers[4].bias.data = torch.zeros(4)


def freeze(model, optimizer):
    model.layers[0].requires_grad_(False)


def add_a_parameter(model, optimizer):
    model.extra = nn.Parameter(torch.zeros(1))


def replace_a_module(model, optimizer):
    model.layers[2] = nn.Identity()


def replace_a_buffer(model, optimizer):
    model.layers[1].running_mean = torch.zeros(6)


def evaluate_a_module(model, optimizer):
    model.layers[1].eval()


def add_a_group(model, optimizer):
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def change_the_learning_rate(model, optimizer):
    optimizer.param_groups[0]["lr"] = 0.1


def load_the_optimizer(model, optimizer):
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            replace_a_parameter,
            "model.layers.4.bias was replaced since the step was captured; make a new GraphedStep",
        ),
        (move_a_parameter, "model.layers.4.bias was moved"),
        (freeze, "model.layers.0.weight was frozen or unfrozen"),
        (add_a_parameter, "parameters, buffers or modules were added or removed"),
        (replace_a_module, "model.layers.2 was replaced"),
        (replace_a_buffer, "model.layers.1.running_mean was replaced"),
        (evaluate_a_module, r"model.layers.1 was set to another mode \(train or eval\)"),
        (add_a_group, "parameters of the optimizer were added or removed"),
        (change_the_learning_rate, r"lr of the optimizer's group 0 was changed \(only a tensor on the GPU may be"),
        (load_the_optimizer, r"the optimizer's state was replaced \(as by load_state_dict\)"),
    ],
)
def test_what_a_graph_would_not_notice_is_refused(rehearsed, change, message):
    model, optimizer, graphed = make()
    change(model, optimizer)
    with pytest.raises(CaptureError, match=message):
        graphed(*next(batches(1)))


def test_what_stays_in_place_may_change(rehearsed):
    """Weights that are loaded, gradients that are dropped, and a mode that is set and set back."""
    model, optimizer, graphed = make()
    graphed(*next(batches(1)))
    model.load_state_dict(Net().state_dict())
    optimizer.zero_grad()
    model.eval()
    model.train()
    optimizer.param_groups[0]["lr"] = float("0.03")
    graphed(*next(batches(1)))


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("module", [fastconv.Classifier, fastconv.reference.Classifier, Net])
def test_a_graph_computes_eager_steps(deterministic, module, autocast):
    model = Net() if module is Net else module(width=16, depth=2, patch=1, num_classes=4)
    assert_steps_equal(adamw, model, autocast=autocast, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_graph_of_each_optimizer(deterministic, optimizer):
    assert_steps_equal(OPTIMIZERS[optimizer], Net(), device="cuda")


@pytest.mark.gpu
def test_a_call_does_not_wait_and_returns_one_tensor():
    model = Net().to("cuda")
    first, second = batches(2, device="cuda")
    graphed = GraphedStep(model, F.cross_entropy, adamw(model.parameters()), first)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = graphed(*first)
        before = loss.clone()
        assert graphed(*second) is loss
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss != before


@pytest.mark.gpu
def test_waiting_in_the_backward_is_found_in_its_thread():
    assert_refused("calls aten._local_scalar_dense", loss=cross_entropy_of(Wait.apply), device="cuda")


@pytest.mark.gpu
def test_random_numbers_of_the_cpu_are_refused():
    loss = cross_entropy_of(lambda x: x * torch.rand(()).item())
    assert_refused("draws random numbers on the CPU, .* draw them on cuda:0", loss=loss, device="cuda")


def synchronizing(x):
    torch.cuda.synchronize()
    return x


@pytest.mark.gpu
def test_what_cuda_refuses_is_undone_and_another_step_can_be_captured(deterministic):
    stream = torch.cuda.current_stream()
    assert_refused("CUDA cannot capture the step in a graph", loss=cross_entropy_of(synchronizing), device="cuda")
    assert torch.cuda.current_stream() == stream
    assert_steps_equal(adamw, Net(), device="cuda")
