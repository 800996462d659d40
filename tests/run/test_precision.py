"""`engine.precision`: auto is bf16 where the device has it, fp16 on a V100, and the run keeps the answer; bf16 that is
asked for by name is refused where the device has none."""

import pytest
import torch

from fastdeit.bench.count_card import pretended_card
from fastdeit.cli import main as cli
from fastdeit.engine.dist import World
from fastdeit.errors import UsageError
from fastdeit.estimate import duration
from fastdeit.estimate.gpus import GPUS
from fastdeit.kernels import _triton
from fastdeit.recipe import resolve as recipes
from fastdeit.run import health, precision, request

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)
AUTO = ["deit_tiny", "deit_small", "deit_base"]


def recipe(*overrides, name="deit_tiny"):
    return recipes.load(name, overrides)


@pytest.fixture
def card(monkeypatch):
    """`card(70)`: the only device is a card of that architecture."""

    def there_is(arch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: divmod(arch, 10))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a card of sm_{arch}")
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        _triton._arch_of.cache_clear()

    yield there_is
    _triton._arch_of.cache_clear()


@pytest.mark.parametrize("name", AUTO)
@pytest.mark.parametrize(("arch", "wanted"), [(70, "fp16"), (75, "fp16"), (80, "bf16"), (90, "bf16")])
def test_the_papers_recipes_run_in_16_bit_on_every_card(card, name, arch, wanted):
    card(arch)
    said = []
    found = precision.fixed(recipe(name=name), World(CARD), said.append)
    assert found.engine.precision == wanted
    assert precision.fixed(recipe(name=name)).engine.precision == wanted
    line = f"engine.precision auto: fp16 with a scaled loss, since a card of sm_{arch} has no products in bf16"
    assert said == [line] * (wanted == "fp16")


def test_on_a_cpu_it_is_bf16():
    assert precision.fixed(recipe(), World(CPU)).engine.precision == "bf16"


@pytest.mark.parametrize(("asked", "arch"), [("fp32", 70), ("fp16", 70), ("fp16", 90), ("bf16", 80), ("bf16", 90)])
def test_what_is_asked_for_stays(card, asked, arch):
    card(arch)
    given = recipe(f"engine.precision={asked}")
    assert precision.fixed(given) is given
    assert precision.fixed(given, World(CARD)) is given


@pytest.mark.parametrize("arch", [70, 75])
def test_bf16_is_refused_on_a_card_without_it(card, arch):
    card(arch)
    wanted = f"engine.precision is bf16, which a card of sm_{arch} does not have; use engine.precision=fp16, or auto"
    for world in (None, World(CARD)):
        with pytest.raises(UsageError, match=wanted):
            precision.fixed(recipe("engine.precision=bf16"), world)


class Second(World):
    """One of two processes, of which the other one has a V100."""

    def first(self, value):
        return value or "the other's V100"


def test_one_card_without_bf16_decides_for_all_processes(card):
    card(90)
    with pytest.raises(UsageError, match="bf16, which the other's V100 does not have"):
        precision.fixed(recipe("engine.precision=bf16"), Second(CARD))
    assert precision.fixed(recipe(), Second(CARD)).engine.precision == "fp16"


def test_the_command_refuses_bf16_before_anything_is_trained(card, tmp_path, capsys):
    card(70)
    words = ["train", "digits", "engine.precision=bf16", "engine.device=cuda", "--run-dir", str(tmp_path / "run")]
    assert cli(words) == cli([*words, "--dry-run"]) == 2
    assert "fastdeit: engine.precision is bf16, which a card of sm_70 does not have; use" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_residual_in_bf16_needs_a_device_with_it(card):
    given = recipe("engine.residual=bf16")
    card(90)
    assert precision.fixed(given).engine.residual == "bf16"
    card(70)
    with pytest.raises(UsageError, match="residual is bf16, which a card of sm_70 does not have; use"):
        precision.fixed(given)


@pytest.mark.parametrize("arch", [70, 80, 86])
def test_products_of_8_bits_need_a_device_with_them(card, arch):
    """Of the device of any process; an evaluation has none, and asks for none."""
    given = recipe("engine.products=fp8")
    precision.check_products(given, World(CPU))
    for able in (89, 90):
        card(able)
        precision.check_products(given, World(CARD))
    with pytest.raises(UsageError, match=r"fp8, but the other's V100; use engine\.products=precision"):
        precision.check_products(given, Second(CARD))
    card(arch)
    wanted = f"engine.products is fp8, but it needs sm_89 or newer, not sm_{arch}; use engine.products=precision"
    for world in (None, World(CARD)):
        with pytest.raises(UsageError, match=wanted):
            precision.check_products(given, world)
    precision.check_products(recipe(), World(CARD))
    assert precision.fixed(given, World(CARD)).engine.products == "fp8"


def test_gradients_that_travel_in_fp16_need_products_in_fp16(card):
    card(70)
    asked = recipe("engine.precision=auto", "engine.reduce=fp16")
    assert precision.fixed(asked, World(CARD)).engine.precision == "fp16"
    card(90)
    with pytest.raises(UsageError, match=r"auto is bf16 here; use engine\.reduce=bf16"):
        precision.fixed(asked, World(CARD))


def test_a_run_that_goes_on_keeps_its_precision():
    before = recipe("engine.precision=fp16")
    assert request.given_again(recipe(), before).engine.precision == "fp16"
    assert request.given_again(recipe("engine.precision=fp32"), before).engine.precision == "fp32"


@pytest.mark.parametrize(("gpu", "wanted"), [("V100", "fp16"), ("A100", "bf16"), ("H200", "bf16")])
def test_a_plan_has_what_would_run(gpu, wanted):
    assert duration.precision(recipe(), GPUS[gpu]) == wanted


@pytest.mark.parametrize(("arch", "other"), [(70, "fp32"), (90, "bf16")])
def test_where_fp16_fails_another_precision_of_the_card_is_named(card, tmp_path, arch, other):
    card(arch)
    error = health.gave_up(recipe("engine.precision=fp16"), tmp_path, 24, 24, World(CARD), str)
    assert str(error).endswith(f" or engine.precision={other}")


def test_the_loss_is_scaled_on_a_v100():
    from fastdeit.engine.guard import Guard

    with pretended_card(arch=70):
        found = precision.fixed(recipe("engine.device=cuda"), World(CARD)).engine.precision
    assert Guard(found, None, CPU).scale.item() == 2.0**16
