"""Networks that processes share in parts (FSDP2), against networks that each has whole (DDP): what becomes of them."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastdeit.engine import parallel, shards
from fastdeit.engine.clip import UnitClipping
from fastdeit.engine.dist import World
from fastdeit.engine.ema import Ema, EmaTeacher
from fastdeit.engine.groups import GradientError, default_groups
from fastdeit.engine.optimizers import find
from fastdeit.engine.options import AdamWOptions, LambOptions, SgdOptions
from fastdeit.engine.parallel import ShardError
from fastdeit.engine.step import Engine
from fastdeit.methods.base import Out
from fastdeit.models.config import ViTConfig
from fastdeit.models.vit import VisionTransformer
from tests.small_runs import fsdp2_is_there

pytestmark = fsdp2_is_there

STEPS = 3
CONFIG = ViTConfig(16, 8, dim=12, depth=2, heads=2, mlp_ratio=1.25, num_classes=5, distilled=True, layer_scale=0.5)
"""Numbers of rows that two and four processes cannot divide, and fewer rows than processes."""


class Toy(nn.Module):
    """A method to the engine: a small transformer that learns from its own average and from the mean of its answers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = VisionTransformer(CONFIG)
        self.teacher = EmaTeacher(self.model, 0.7)
        self.scale = nn.Parameter(torch.full((1,), 2.0))
        self.bad = (None, None)

    def forward(self, x):
        one, other = self.model(x)
        loss = (self.scale * one - self.teacher(x)[1]).float().square().mean() + other.float().square().mean()
        return self.returns(loss)

    def step(self, batch, engine):
        with engine.micro():
            loss = engine.run(batch).loss
            if self.bad == (engine.world.rank, self.steps):
                loss = loss * torch.nan
            engine.backward(loss)

    def after_step(self, engine):
        self.steps += 1

    steps, returns = 0, Out

    def predict(self, x):
        queries, _, _ = self.model.qkv(1, self.model.tokens(x, stop=1))
        return {"class": self.model(x)[0] + queries.mean()}


OPTIONS = {"sgd": SgdOptions(), "adamw": AdamWOptions(eps=1e-3), "lamb": LambOptions(eps=1e-3)}
"""With a small eps, Adam makes whole updates of gradients that are nothing but rounding, as those of the keys' bias."""


RATES = {"adamw": 1e-2}


def made(kind, world, *, optim="sgd", reduce="fp32", bad=(None, None), again=False, **options):
    """An engine with networks shared in this way."""
    method = Toy()
    method.bad = bad
    method.model.set_grad_checkpointing(again)
    share = parallel.of(kind, world, reduce)
    share.spread(method)
    optimizer = find(optim)(default_groups(method.named_parameters(), 0.05), OPTIONS[optim])
    options = {"precision": "fp32", "accumulate": 1} | options
    return Engine(method, optimizer, world, parallel=share, ema=Ema(optimizer.params, 0.5, method), **options)


def everything(engine, x):
    """All tensors of a run by name, whole, and what the network and its average answer to `x`."""
    found = engine.method.state_dict() | engine.optimizer.state_dict()
    found |= {f"average.{name}": tensor for name, tensor in engine.ema.average.items()}
    found = {name: shards.whole(tensor) for name, tensor in found.items()}
    with torch.no_grad():
        found["answer"] = engine.method.predict(x)["class"]
        with engine.ema.applied():
            found["answer of the average"] = engine.method.predict(x)["class"]
        found["answer again"] = engine.method.predict(x)["class"]
    found["norm"] = torch.tensor(engine.means().get("grad_norm", 0.0))
    return {name: tensor.detach().numpy().copy() for name, tensor in found.items()}


def trained(rank, size, cases):
    """{case: {kind: everything after some steps}} of cases that are options of `made`."""
    world, found = World(torch.device("cpu"), rank, size), {}
    x = torch.randn(STEPS, 8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for name, options in cases.items():
        found[name] = {}
        for kind in ("ddp", "fsdp2"):
            engine = made(kind, world, **options)
            for number in range(STEPS):
                batch = x[number].chunk(size)[rank]
                engine.step(batch.chunk(engine.accumulate), RATES.get(options.get("optim"), 0.1))
            found[name][kind] = everything(engine, x[0])
    return found


SAME = {
    "sgd": {},
    "micro-batches": {"accumulate": 2},
    "gradients in 16 bit": {"reduce": "bf16"},
    "bf16, blocks computed again": {"precision": "bf16", "again": True},
    "a step that one process skips": {"bad": (1, 1)},
}
"""On two processes these have the same bits, but for the norm of the gradients: each sum has two summands."""
SAME_TOO = {
    "blocks computed again": {"again": True},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
}
NEAR = {
    "clipping": {"clip_grad": 0.01},
    "clipping of units": {"clip_units": UnitClipping(0.01, ["model.head"])},
    "lamb": {"optim": "lamb"},
    "adamw": {"optim": "adamw"},
}
"""Norms are summed in another order here, and PyTorch's AdamW rounds the last elements of a tensor in another way."""
BOUND = 1e-6
"""Of the norm of a tensor, after three steps."""


def apart(one, other):
    """By name how far the tensors of two runs are apart, of the norm of each; those that have the same bits are not
    listed."""
    assert one.keys() == other.keys()
    found = {}
    for name in one:
        mine, theirs = (torch.from_numpy(run[name]).double() for run in (one, other))
        assert mine.shape == theirs.shape, name
        if not torch.equal(mine, theirs):
            found[name] = ((mine - theirs).norm() / theirs.norm()).item()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("cases", [pytest.param(SAME | NEAR, id="most"), pytest.param(SAME_TOO, id="more")])
def test_two_processes_that_share_in_parts_train_as_two_that_each_have_all(ranks, cases):
    first, second = ranks(2, trained, cases)
    for name in cases:
        found = apart(first[name]["fsdp2"], first[name]["ddp"])
        assert max(found.values(), default=0) < BOUND, name
        assert name in NEAR or set(found) <= {"norm"}, name
        assert not apart(first[name]["fsdp2"], second[name]["fsdp2"]), f"{name}: the processes differ"
    if cases is not SAME_TOO:
        usual, skipping = (first[name]["fsdp2"] for name in ("sgd", "a step that one process skips"))
        assert "model.head.weight" in apart(skipping, usual)


@pytest.mark.slow
def test_four_processes_are_near(ranks):
    names = "sgd", "micro-batches", "clipping", "lamb", "adamw"
    found = ranks(4, trained, {name: (SAME | NEAR)[name] for name in names})[0]
    for name, each in found.items():
        distances = apart(each["fsdp2"], each["ddp"])
        results = [found for tensor, found in distances.items() if tensor.startswith(("model.", "average.", "answer"))]
        assert max(results, default=0) < BOUND, name
        # Four summands are added in another order, and a moment is what gradients leave when they cancel.
        assert max(distances.values(), default=0) < 5 * BOUND, name


# ---- what a process holds, and what is refused -----------------------------------------------------------------------


def looked_at(rank, size):
    """What each process holds of each kind of tensor, as a share of the whole; and what is said of methods that cannot
    be split."""
    world = World(torch.device("cpu"), rank, size)
    engine = made("fsdp2", world)
    engine.step([torch.randn(4, 3, 16, 16)], 0.1)
    kinds = {
        "weights": engine.method.parameters(),
        "moments": engine.optimizer.state["momentum_buffer"].values(),
        "averages": engine.ema.average.values(),
    }
    held = {}
    for kind, tensors in kinds.items():
        tensors = list(tensors)
        mine, all_of_it = (sum(map(torch.Tensor.numel, each)) for each in (map(shards.local, tensors), tensors))
        held[kind] = mine / all_of_it
    return held, [refusal(change, world) for change in (a_scalar, tied_blocks, hidden_loss)]


def a_scalar(method):
    method.scale = nn.Parameter(torch.ones(()))


def tied_blocks(method):
    one, other = method.model.blocks
    other.norm1.weight = one.norm1.weight


def hidden_loss(method):
    method.returns = lambda loss: SimpleNamespace(loss=loss, parts={})


def refusal(change, world):
    method = Toy()
    change(method)
    try:
        parallel.check(method)
        parallel.of("fsdp2", world, "fp32").spread(method)
        method(torch.randn(1, 3, 16, 16))
    except (GradientError, ShardError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def test_each_holds_its_share_and_what_cannot_be_split_is_named(ranks):
    for held, (scalar, tied, hidden) in ranks(2, looked_at):
        assert held == pytest.approx(dict.fromkeys(held, 0.5), abs=0.1)
        assert scalar.startswith("ShardError: 'scale' is a scalar, which has no rows to split")
        assert tied.startswith("ShardError: 'model.blocks.0.norm1.weight' and 'model.blocks.1.norm1.weight' are one")
        assert hidden.startswith(
            "GradientError: engine.parallel fsdp2 finds no tensor with a gradient in the SimpleNames"
        )
