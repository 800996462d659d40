"""What updates take and refuse: every layout, dtype, place and number, for every update on every backend. What they
take they update as PyTorch does a clone, and they write nowhere else."""

import math

import pytest
import torch

from fastdeit import kernels
from fastdeit.kernels._op import OPS
from tests.kernels.test_optimizer import interpreted
from tests.kernels.updates import FORMS, UPDATES

BACKENDS = [
    pytest.param(name, backend.name, marks=interpreted().marks if backend.name == "triton" else [])
    for name in UPDATES
    for backend in OPS[name].backends
    if backend.name != "apex"
]
LISTS = "params", "grads", "exp_avgs", "exp_avg_sqs", "ema", "copies"
WRITTEN = tuple(name for name in LISTS if name != "grads")


def filled(shape, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.5


class Lists:
    """The lists of an update, two tensors in each, and a call of it."""

    def __init__(self, form, change=lambda tensor: tensor, changed=LISTS):
        self.form = form
        self.lists = {}
        for seed, name in enumerate(LISTS):
            first, second = filled((4, 3, 2, 2), seed), filled((5,), seed + 50)
            self.lists[name] = [change(first) if name in changed else first, second]
        self.step = torch.zeros(())
        if form.states == 1:
            del self.lists["exp_avg_sqs"]

    def update(self, lr=0.1, **changes):
        lists = dict(self.lists)
        params, grads, ema, copies = (lists.pop(name) for name in ("params", "grads", "ema", "copies"))
        arguments = {"ema": ema, "ema_decay": 0.5, "copies": copies} | changes
        self.form(params, grads, list(lists.values()), self.step, lr, **arguments)


def column(tensor):
    """A view of every other element, between others that nothing may write to."""
    return torch.stack([tensor, torch.full_like(tensor, 7.0)], -1)[..., 0]


DENSE = {
    "channels last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "a slice of a flat buffer": lambda t: torch.cat([torch.zeros(3), t.flatten()])[3:].view(t.shape),
    "no element": lambda t: t[:0],
    "no element, strided": lambda t: column(t)[:0],
    "one element": lambda t: t[:1, :1, :1, :1].clone(),
    "strides of one element": lambda t: t[:1].clone().as_strided((1, 3, 2, 2), (99, 4, 2, 1)),
}
NOT_DENSE = {
    "strided": column,
    "expanded": lambda t: t[:1].expand(t.shape),
    "overlapping": lambda t: t.flatten().as_strided(t.shape, (2, 4, 2, 1)),
    "with gaps": lambda t: torch.nn.functional.pad(t, (0, 1))[..., :2],
}


@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize(("name", "backend"), [b for b in BACKENDS if b.values[1] != "triton"])
def test_a_dense_layout_is_updated_as_any_other(name, backend, layout):
    mine, plain = Lists(UPDATES[name], DENSE[layout]), Lists(UPDATES[name], lambda t: DENSE[layout](t).contiguous())
    for lists in (mine, plain):
        with kernels.use(backend):
            lists.update()
            lists.update()
    for key, tensors in mine.lists.items():
        torch.testing.assert_close(tensors, plain.lists[key], msg=key)
    assert plain.lists["params"][1].ne(filled((5,), 50)).all()


@pytest.mark.parametrize("layout", [pytest.param(name, marks=pytest.mark.slow) for name in DENSE])
@pytest.mark.parametrize("name", [interpreted(name) for name in UPDATES])
def test_a_dense_layout_in_triton(name, layout):
    if Lists(UPDATES[name], DENSE[layout]).lists["params"][0].is_contiguous():
        test_a_dense_layout_is_updated_as_any_other(name, "triton", layout)
        return
    with kernels.use("triton"), pytest.raises(RuntimeError, match="tensors that are not contiguous"):
        Lists(UPDATES[name], DENSE[layout]).update()


@pytest.mark.parametrize("layout", [*NOT_DENSE, "channels last"])
@pytest.mark.parametrize("changed", LISTS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_other_layouts_are_refused_or_read_only(form, changed, layout):
    """Gradients of any layout are read; whatever is written has to be one block, laid out like its parameter."""
    if form.states == 1 and changed == "exp_avg_sqs":
        pytest.skip("it has one state")
    mine = Lists(form, (NOT_DENSE | DENSE)[layout], {changed})
    before = {key: [t.clone() for t in tensors] for key, tensors in mine.lists.items()}
    if changed == "grads":
        plain = Lists(form)
        plain.lists["grads"][0] = mine.lists["grads"][0].clone()
        mine.update()
        plain.update()
        torch.testing.assert_close(mine.lists, plain.lists)
        return
    # An error of layout is laid to the list that differs from the parameters.
    culprit = changed if layout != "channels last" or changed != "params" else "exp_avgs"
    if form.states == 1 and culprit.startswith("exp_avg"):
        culprit = culprit.replace("exp_avgs", "momentum_buffers")
    with pytest.raises(ValueError, match=rf"^{culprit}\[0\] has .*strides .*, but must (fill one block|have \[)"):
        mine.update()
    torch.testing.assert_close(mine.lists, before, rtol=0, atol=0)


def test_memory_beside_a_strided_parameter_stays_as_it_is():
    """PyTorch's fused kernel ignores strides."""
    base = torch.full((8, 2), 7.0)
    state = [[torch.zeros(8)] for _ in range(2)]
    with pytest.raises(ValueError, match=r"params\[0\] has shape \[8\] and strides \[2\]"):
        FORMS["adamw"]([base[:, 0]], [torch.ones(8)], state, torch.zeros(()), 0.1)
    assert base.eq(7.0).all()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lists: lists["ema"].__setitem__(1, lists["params"][1]), r"params\[1\] and ema\[1\]"),
        (lambda lists: lists["copies"].__setitem__(1, lists["ema"][1]), r"ema\[1\] and copies\[1\]"),
        (lambda lists: lists["ema"].__setitem__(1, lists["params"][0].view(-1)[2:7]), r"params\[0\] and ema\[1\]"),
    ],
    ids=["ema is the parameter", "copy is the average", "overlapping slices"],
)
def test_shared_memory_is_refused(form, change, message):
    mine = Lists(form)
    change(mine.lists)
    with pytest.raises(ValueError, match=rf"^{message} share memory"):
        mine.update()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_parameter_twice_is_refused(form):
    mine = Lists(form)
    for tensors in mine.lists.values():
        tensors[1] = tensors[0].clone()
    mine.update()
    mine.lists["params"][1] = mine.lists["params"][0]
    with pytest.raises(ValueError, match=r"^params\[0\] and params\[1\] share memory"):
        mine.update()


def test_neighbours_in_one_buffer_are_not_shared_memory():
    buffer = torch.zeros(24)
    params, ema = [buffer[:4], buffer[4:8]], [buffer[8:12], buffer[12:16]]
    FORMS["sgd"](params, [torch.ones(4)] * 2, [[buffer[16:20], buffer[20:]]], None, 0.1, ema=ema, ema_decay=0.5)
    assert buffer.ne(0).all()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(
    ("key", "change", "error", "message"),
    [
        ("params", lambda t: t.bfloat16(), TypeError, "params are torch.bfloat16"),
        ("params", lambda t: t.long(), TypeError, "params are torch.int64"),
        ("grads", lambda t: t.long(), TypeError, r"grads\[0\] is torch.int64, but must be a floating-point"),
        ("grads", lambda t: t + 0j, TypeError, r"grads\[0\] is torch.complex64"),
        ("grads", lambda t: t.to_sparse(), TypeError, r"grads\[0\] is torch.sparse_coo, but must be a dense tensor"),
        ("grads", lambda t: t.to("meta"), ValueError, r"grads\[0\] is on meta, but must be on cpu"),
        ("ema", lambda t: t.bfloat16(), TypeError, r"ema\[0\] is torch.bfloat16"),
        ("ema", lambda t: t.to("meta"), ValueError, r"ema\[0\] is on meta"),
        ("copies", lambda t: t.int(), TypeError, r"copies\[0\] is torch.int32"),
    ],
)
def test_kinds_are_refused(form, key, change, error, message):
    mine = Lists(form, change, {key})
    if key == "params":
        mine.lists["params"] = list(map(change, Lists(form).lists["params"]))
    with pytest.raises(error, match=message):
        mine.update()


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_numbers_are_checked(form, value):
    numbers = {"weight_decay": value, "ema_decay": value, "lr": value}
    numbers |= {"eps": value, "betas": (value, 0.9)} if form.counted else {"momentum": value}
    for name, number in numbers.items():
        with pytest.raises(
            ValueError, match=rf"^{name}(\[0\])? is {value}, but must be (at least 0 and finite|in \[0, 1)"
        ):
            Lists(form).update(**{name: number})
    with pytest.raises(ValueError, match=rf"^lr is {value}"):
        Lists(form).update(lr=torch.tensor(value))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_scalars_are_checked(form):
    for name, tensor, error in (
        ("lr", torch.zeros(2), ValueError),
        ("lr", torch.tensor(1), TypeError),
        ("grad_scale", torch.tensor(1), TypeError),
        ("grad_scale", torch.ones(1), ValueError),
        ("found_inf", torch.zeros(1), ValueError),
    ):
        with pytest.raises(error, match=f"^{name} "):
            Lists(form).update(**{name: tensor})


@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize(("name", "backend"), BACKENDS)
def test_autograd_sees_every_change(name, backend, skipped):
    """The version of every tensor that an update may write, on a card even of a skipped one: the host cannot know."""
    mine = Lists(UPDATES[name])
    written = [t for key, tensors in mine.lists.items() if key in WRITTEN for t in tensors]
    written += [mine.step] if mine.form.counted else []
    before = [t._version for t in written]
    with kernels.use(backend):
        mine.update(found_inf=torch.tensor(skipped))
    if backend == "triton" or not skipped:
        assert all(t._version > version for t, version in zip(written, before, strict=True))
    assert [t._version for t in mine.lists["grads"]] == [0, 0]
