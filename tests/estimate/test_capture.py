"""`engine.capture: auto`: who gets a CUDA graph, that it is said in a line, and that the run keeps it."""

from types import SimpleNamespace

import pytest
import torch

from fastdeit.engine.dist import World
from fastdeit.estimate import capture
from fastdeit.recipe import resolve as recipes
from fastdeit.run import request

AUTO = ["engine.capture=auto", "engine.precision=bf16"]
H200 = "NVIDIA H200"


def recipe(*words, name="deit_tiny"):
    return recipes.load(name, [*AUTO, *words])


@pytest.mark.parametrize(
    ("words", "processes", "expected"),
    [
        (["model.name=deit_base_patch16_224"], 1, "none"),
        (["model.name=deit_base_patch16_224"], 4, "none"),
        (["train.batch_size=512"], 4, "graph"),  # 5.0 and 4.3 ms
        (["train.batch_size=1024"], 4, "none"),  # 9.4 and 4.3 ms
        (["train.batch_size=512"], 1, "none"),
    ],
)
def test_a_graph_is_taken_where_the_gpu_could_have_to_wait_for_the_host(words, processes, expected):
    found, why = capture.chosen(recipe(*words, "data.group_size=64"), H200, processes)
    busy, host = (float(text.split(" ms")[0]) for text in (why.split("H200 ")[1], why.split("host ")[1]))
    assert found == expected == ("graph" if busy < 2 * host else "none")


def test_micro_batches_cost_the_host_as_much_again():
    _, whole = capture.chosen(recipe("data.group_size=64"), H200, 1)
    _, parts = capture.chosen(recipe("data.group_size=64", "train.accumulate=4"), H200, 1)
    whole, parts = (float(text.split("host ")[1].split(" ms")[0]) for text in (whole, parts))
    assert 3 * whole < parts < 4 * whole  # the update is made once


@pytest.mark.parametrize(
    ("words", "besides"),
    [
        (["model.freeze=[embedding,blocks.0-8]"], []),
        (["model.drop_path_skip=true"], ["model.drop_path=0.5"]),
        (["engine.residual=bf16"], []),
        (["engine.products=fp8"], ["model.name=deit_base_patch16_224"]),
    ],
)
def test_the_modelled_step_is_that_of_the_recipe(words, besides):
    """What is frozen has no backward, and what is skipped is not computed."""

    def busy(*words):
        _, why = capture.chosen(recipe("data.group_size=64", *besides, *words), H200, 1)
        return float(why.split("H200 ")[1].split(" ms")[0])

    assert busy(*words) < 0.97 * busy()


def test_of_a_size_schedule_the_smallest_images_decide():
    words = ["train.batch_size=256", "data.group_size=64"]
    small, large = (capture.chosen(recipe(*words, f"model.image_size={size}"), H200, 1) for size in (128, 224))
    assert (small[0], large[0]) == ("graph", "none")
    for schedule in ("[[0, 128], [9, 224]]", "[[0, 224], [9, 128]]"):
        found, why = capture.chosen(recipe(*words, f"data.size_schedule={schedule}"), H200, 1)
        assert found == "graph"
        assert why.replace(" with images of 128 x 128", "") == small[1]


@pytest.mark.parametrize(
    ("words", "card", "why"),
    [
        ([], None, "since there are no CUDA graphs on a CPU"),
        ([], "NVIDIA H100 PCIe", "since there is no model of the speed of NVIDIA H100 PCIe"),
        (["optim.name=tests.toys:Sign"], H200, "since tests.toys:Sign is not fastdeit's own; say graph if its updates"),
        (["method.use=tests.toys:Toy"], H200, "since method tests.toys:Toy is not fastdeit's own; say graph if"),
        (["model.timm=deit_tiny_patch16_224", "model.name=null"], H200, "since timm's models draw from torch's gener"),
    ],
)
def test_where_nothing_is_known_there_is_none(words, card, why):
    made = recipe()
    if words:  # the reader would import the method
        section, _, value = words[0].partition("=")
        section, _, field = section.partition(".")
        changed = getattr(made, section).model_copy(update={field: value})
        made = made.model_copy(update={section: changed})
    found, said = capture.chosen(made, card, 1)
    assert (found, said.startswith(why)) == ("none", True), said


def test_the_answer_is_said_in_a_line_and_kept_by_the_run(monkeypatch):
    said = []
    cpu = World(torch.device("cpu"))
    begun = capture.fixed(recipe(), cpu, said.append)
    assert begun.engine.capture == "none"
    assert said == ["engine.capture auto: none, since there are no CUDA graphs on a CPU"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: H200)
    on_card = SimpleNamespace(device=torch.device("cuda", 0), size=4, same=lambda value: value)
    small = recipe("train.batch_size=256", "data.group_size=64")
    graphed = capture.fixed(small, on_card, said.append)
    assert graphed.engine.capture == "graph"
    assert said[1].startswith("engine.capture auto: graph, since a step takes H200 ")
    assert capture.fixed(graphed, cpu, said.append) is graphed  # nothing is chosen twice
    assert len(said) == 2
    for before in (begun, graphed):
        assert request.given_again(small, before).engine.capture == before.engine.capture
    asked = recipes.load("deit_tiny", ["engine.capture=compile"])
    assert request.given_again(asked, graphed).engine.capture == "compile"
