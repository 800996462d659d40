"""The estimate against independent counts: torch's own, a ring simulated message by message, and published speeds."""

import inspect
import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastdeit import kernels, models
from fastdeit.engine.ema import Ema
from fastdeit.engine.groups import default_groups
from fastdeit.engine.optimizers import AdamW
from fastdeit.estimate import communication, gpus, memory, options, subject
from fastdeit.estimate import designs as estimate_designs
from fastdeit.estimate import model as estimate
from fastdeit.estimate import networks as estimate_networks
from fastdeit.estimate import rows as estimate_rows
from fastdeit.estimate.designs import DESIGNS, EAGER, EPILOGUE, FUSED, TIMM, TIMM_COMPILE
from fastdeit.estimate.gpus import GPUS
from fastdeit.estimate.networks import Network, ViT, Work
from fastdeit.kernels import _op
from fastdeit.kernels.attention import fused_backward, tiles
from fastdeit.kernels.attention.hopper import backend as hopper
from fastdeit.kernels.native.launches import HEAD_DIMS
from fastdeit.models.deit import CONFIGS
from tests.small_runs import Tiny

NAMES = list(CONFIGS)


def vit_of(model):
    config = model.config
    patches = config.grid[0] * config.grid[1]
    values, hidden = config.in_chans * config.patch_size**2, int(config.dim * config.mlp_ratio)
    shape = patches, model.prefix_tokens, values, config.dim, config.depth, config.heads, hidden, config.num_classes
    return ViT(*shape)


def network_of(vit):
    return Network("vit", vit.parameters, vit.flops, vit.patches * vit.patch_values, vit.prefix * vit.classes, vit=vit)


def on_meta(name, **options):
    with torch.device("meta"):
        return models.build(name, **options)


BASE = network_of(ViT(196, 2, 768, 768, 12, 12, 3072, 1000))
CONVNET = Network("convnet", 1000, 10**9, 3 * 224**2, 1000, saved=10**6, widest=10**5)


def time(network=BASE, batch=256, design=FUSED, gpu="A100", **work):
    return sum(estimate.step(network, Work(batch, **work), design, GPUS[gpu]))


# ---- operations and shapes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_flops_and_parameters_are_the_model_s(name):
    model = on_meta(name)
    assert vit_of(model).flops == model.flops()
    assert vit_of(model).parameters == sum(tensor.numel() for tensor in model.state_dict().values())


@pytest.mark.parametrize(
    ("name", "depth", "pruned"),
    [
        ("deit3_small_patch16_224", 12, True),
        ("deit_small_patch16_18x2_LS", 36, True),
        ("vit_small_patch16_gap_224", 12, False),
        ("vitc_1gf_224", 11, True),
    ],
)
def test_relatives_of_deit_have_the_shape_of_a_vision_transformer(name, depth, pruned):
    """Nearly: blocks in turn for parallel ones, and a stem of as many FLOPs."""
    network = subject.network(name, None, None, 1000)
    assert (network.vit.depth, network.vit.pruned) == (depth, pruned)
    assert network.flops == on_meta(name).flops() == pytest.approx(network.vit.flops, rel=0.03)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "deit_small_patch16_224"])
def test_flops_of_a_training_step_are_those_that_torch_counts(name):
    model = models.build(name, image_size=(64, 96), depth=3)
    patches = torch.rand(2, vit_of(model).patches, vit_of(model).patch_values)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(patches)
        sum(head.sum() for head in (out if isinstance(out, tuple) else (out,))).backward()
    found = estimate.ops(network_of(vit_of(model)), Work(2), EAGER, GPUS["A100"])
    # The library makes the scores a second time: five products in backward, of which torch counts the four needed.
    once = {("library", "backward"): 4 / 5}
    assert sum(op.count * op.flops * once.get((op.kind, op.phase), 1) for op in found) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("design", "drop_path", "bytes_per_value"),
    [
        # LayerNorms, residual additions, casts; drop-path; GELU; attention; packing; bias gradients
        (TIMM, True, 136 + 16 + 40 + 42 + 24 + 18),
        (TIMM, False, 136 + 40 + 42 + 24 + 18),
        (EAGER, True, 136 + 16 + 40 + 42 + 12 + 18),
        (TIMM_COMPILE, True, 56 + 40 + 42 + 12 + 18),
        (FUSED, True, 56 + 48 + 32),
        (replace(FUSED, attention="fused_backward"), True, 56 + 48 + 24),
        (EPILOGUE, True, 56 + 32),
        (options.narrowed(FUSED), True, 36 + 48 + 32),
    ],
    ids=["timm", "timm without drop-path", "eager", "timm_compile", "fused", "fused backward", "epilogue", "16 bit"],
)
def test_bytes_between_the_products_of_a_block(design, drop_path, bytes_per_value):
    """In units of tokens * channels, 16 bit: the table in docs/plan.md."""
    work, card = Work(64, drop_path=drop_path), GPUS["A100"]
    found = estimate._block(BASE.vit, work, design, card, BASE.vit.tokens)
    assert sum(op.count * op.bytes for op in found if op.kind != "gemm") == bytes_per_value * 64 * 198 * 768


def test_gelu_in_the_products_makes_them_move_more():
    fused, epilogue = (
        sum(op.bytes for op in estimate._products(BASE.vit, Work(64), design, GPUS["A100"], 198))
        for design in (FUSED, EPILOGUE)
    )
    written, written_and_read = 2, 2 * 2
    assert epilogue - fused == (written + written_and_read) * 64 * 198 * 3072


def test_pruning_the_last_block_saves_what_it_leaves_out():
    pruned, whole = BASE.vit, replace(BASE.vit, pruned=False)
    left_out = whole.tokens - whole.prefix
    per_row = 2 * 768 * 768 + 2 * 198 * 768 + 2 * 768 * 3072
    assert whole.flops - pruned.flops == 2 * left_out * per_row
    assert time(network_of(whole)) > time(network_of(pruned))


# ---- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", DESIGNS.values(), ids=str)
@pytest.mark.parametrize("gpu", GPUS)
def test_no_step_beats_the_hardware(gpu, design):
    card, work = GPUS[gpu], Work(256, ema=True)
    found = estimate.ops(BASE, work, design, card)
    for amount, peak in (("flops", card.flops), ("bytes", card.bandwidth)):
        assert sum(op.count * getattr(op, amount) for op in found) / peak < sum(estimate.step(BASE, work, design, card))


def test_time_grows_with_the_batch_and_less_than_it():
    times = [time(batch=batch) for batch in (64, 128, 256, 512)]
    assert all(less < more <= 2 * less for less, more in pairwise(times))


@pytest.mark.parametrize("design", ["timm", "timm_compile", "fused"])
def test_a_larger_card_is_faster(design):
    times = [time(gpu=gpu, design=DESIGNS[design]) for gpu in ("V100", "A100", "H100", "H200")]
    assert times == sorted(times, reverse=True)


def test_fusing_more_is_faster_on_a_busy_gpu():
    eager, timm, compiled, fused, epilogue = (time(design=design) for design in DESIGNS.values())
    assert timm > compiled > fused > epilogue
    assert eager > fused


def test_small_steps_take_the_host_s_time():
    found = estimate.ops(BASE, Work(1), EAGER, GPUS["H100"])
    launches = sum(op.count * op.launches for op in found)
    assert time(batch=1, design=EAGER, gpu="H100") == pytest.approx(launches * EAGER.launch)


def test_float32_and_options_cost_time():
    assert time(precision="fp32") > 1.5 * time(precision="bf16")
    assert time(ema=True) > time(ema=False)
    assert time(design=EAGER, drop_path=True) > time(design=EAGER, drop_path=False)


def test_on_a_v100_attention_is_native_where_the_heads_fit():
    expected = {"forward": [(1, 11)], "backward": [(3, 11)]}
    fits, not_fp16, wide = (
        {
            phase: [(op.launches, op.count) for op in found if (op.kind, op.phase) == ("ours", phase)]
            for phase in expected
        }
        for found in (
            estimate.ops(network_of(replace(BASE.vit, heads=heads)), Work(64, precision), FUSED, GPUS["V100"])
            for heads, precision in ((12, "fp16"), (12, "fp32"), (4, "fp16"))
        )
    )
    assert fits == expected  # the last block's queries are the library's
    assert not_fp16 == wide == {"forward": [], "backward": []}
    assert estimate_designs._NATIVE_WIDTHS == HEAD_DIMS


def test_on_a_v100_wide_attention_is_the_library_s():
    kinds = {
        op.kind for op in estimate.ops(network_of(replace(BASE.vit, heads=4)), Work(64, "fp16"), FUSED, GPUS["V100"])
    }
    assert "library" in kinds
    assert "ours" not in kinds


@pytest.fixture
def choose(monkeypatch):
    """`choose(attention={...}, mlp={...})` is the table of choices for sm_80."""

    def use(**rows):
        monkeypatch.setattr(gpus, "_choices", lambda: {"sm_80": rows})

    return use


def attention_backward(work=None, gpu="A100", tokens=196 + 2, heads=12, pruned=True, design=FUSED):
    """(FLOPs over those of one product of scores, launches) of attention's backward in a block of all tokens."""
    vit = replace(BASE.vit, patches=tokens - 2, heads=heads, pruned=pruned)
    work = work or Work(8)
    found = estimate.ops(network_of(vit), work, design, GPUS[gpu])
    op = next(op for op in found if op.phase == "backward" and op.kind in ("ours", "library"))
    return op.flops / (2 * work.batch * tokens * tokens * 768), op.launches


@pytest.mark.parametrize(
    ("backend", "expected"), [("triton", (7, 4)), ("fused_backward", (5, 2)), ("hopper", (5, 2)), ("reference", (5, 3))]
)
def test_attention_is_what_the_table_of_choices_has_for_the_gpu(choose, backend, expected):
    choose(attention={"backend": backend})
    assert attention_backward() == expected
    assert attention_backward(gpu="H100") == (7, 4)


def test_a_width_has_a_choice_of_its_own(choose):
    choose(attention={"backend": "triton", "widths": {"2304": {"backend": "fused_backward"}}})
    assert attention_backward() == (5, 2)
    choose(attention={"backend": "fused_backward", "widths": {"2304": {"backend": "triton"}}})
    assert attention_backward() == (7, 4)


@pytest.mark.parametrize(
    "options", [{"tokens": 209}, {"heads": 8}, {"work": Work(8, "fp32")}], ids=["tokens", "width of heads", "fp32"]
)
@pytest.mark.parametrize("backend", ["fused_backward", "hopper"])
def test_what_one_program_a_head_does_not_take_goes_to_the_split_one(choose, options, backend):
    choose(attention={"backend": backend})
    assert attention_backward(**options) == (7, 4)
    assert attention_backward(tokens=208) == (5, 2)


def test_limits_and_padding_of_the_fused_backward_are_the_kernel_s():
    limits = estimate_designs._FUSED_BACKWARD_TOKENS, estimate_designs._FUSED_BACKWARD_WIDTH
    assert limits == (fused_backward.MOST_TOKENS, fused_backward.WIDEST_HEAD) == (hopper.MOST_TOKENS, hopper.HEAD_WIDTH)
    for tokens in range(1, limits[0] + 1):
        assert sum(tiles.chunks(tokens)) == estimate._padded(tokens, 16)


def test_the_last_block_s_queries_have_the_split_backward(choose):
    choose(attention={"backend": "fused_backward"})
    counts = [
        sorted(
            (op.launches, op.count)
            for op in estimate.ops(network_of(replace(BASE.vit, pruned=pruned)), Work(8), FUSED, GPUS["A100"])
            if (op.kind, op.phase) == ("ours", "backward")
        )
        for pruned in (True, False)
    ]
    assert counts == [[(2, 11), (4, 1)], [(2, 12)]]


@pytest.mark.parametrize(("precision", "same"), [("bf16", True), ("fp32", False)])
def test_the_mlp_is_what_the_table_of_choices_has(choose, precision, same):
    choose(mlp={"backend": "epilogue"})
    fused, epilogue = (estimate.ops(BASE, Work(8, precision), design, GPUS["A100"]) for design in (FUSED, EPILOGUE))
    assert (fused == epilogue) == same


def test_the_table_of_choices_is_read_as_the_kernels_read_it():
    for card, rows in _op._measured().items():
        for name, row in rows.items():
            for width in [*map(int, row.get("widths", {})), 12345]:
                wanted = _op._at_width(row, [torch.empty(1, width, device="meta")])["backend"]
                assert gpus.backend(replace(GPUS["A100"], arch=card), name, width) == wanted
    assert gpus.backend(replace(GPUS["A100"], arch="sm_1"), "attention", 2304) == "triton"


def test_gelu_is_made_again_as_the_mlp_does_by_default():
    recomputed = inspect.signature(kernels.mlp).parameters["recompute"].default
    assert FUSED.kept[1] == EPILOGUE.kept[1] == 2 - recomputed


@pytest.mark.parametrize("design", [FUSED, EPILOGUE])
def test_kept_activations_take_memory_and_save_bytes(design):
    """One more of the MLP's hidden values is kept, and one fewer written, in every block."""
    kept, work = options.keeping(design), Work(256)
    rows = 256 * sum(BASE.vit.rows) * BASE.vit.hidden * work.bytes
    held = [sum(memory.blocks_saved(BASE.vit, work, side)) for side in (design, kept)]
    moved = [sum(op.bytes * op.count for op in estimate.ops(BASE, work, side, GPUS["A100"])) for side in (design, kept)]
    assert held[1] - held[0] == moved[0] - moved[1] == rows
    assert options.keeping(EAGER) is EAGER


def test_designs_that_cannot_run_are_not_offered():
    def names(gpu, precision="bf16", network=BASE):
        return [design.name for design in estimate_designs.compared(GPUS[gpu], precision, network)]

    assert names("A100") == ["timm", "timm_compile", "fused", "epilogue"]
    assert names("V100", "fp16") == names("A100", "fp32") == ["timm", "timm_compile", "fused"]
    assert names("A100", network=replace(BASE, own=False)) == ["timm", "timm_compile"]
    assert names("A100", network=CONVNET) == ["eager"]


def test_other_networks_follow_their_flops():
    twice = replace(CONVNET, flops=2 * CONVNET.flops)
    forward = [estimate.step(network, Work(512), EAGER, GPUS["A100"]).forward for network in (CONVNET, twice)]
    assert forward[1] == pytest.approx(2 * forward[0], rel=0.01)


# ---- memory ----------------------------------------------------------------------------------------------------------


def saved_bytes(backend, batch, depth, keep_activations=False):
    """Bytes that torch keeps for the backward of a small model in bf16, weights left out."""
    model = models.build("deit_tiny_distilled_patch16_224", image_size=64, depth=depth, drop_path=0.1)
    model.set_keep_activations(keep_activations)
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    patches, noise = torch.rand(batch, 16, 768).bfloat16(), torch.rand(batch, model.noise_per_sample)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with kernels.use(backend), torch.autocast("cpu", torch.bfloat16), hooks:
        out = model(patches, noise=noise)
    assert len(out) == 2
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    ("design", "backend", "keep"), [(EAGER, "auto", False), (FUSED, "reference", False), (FUSED, "reference", True)]
)
def test_blocks_keep_what_torch_keeps(design, backend, keep):
    """The registered references keep what the fused kernels keep. Differences leave copies of weights out."""
    two, three = (saved_bytes(backend, 3, depth, keep) - saved_bytes(backend, 2, depth, keep) for depth in (2, 3))
    vit = ViT(16, 2, 768, 192, 3, 3, 768, 1000)
    full, _, last = memory.blocks_saved(vit, Work(1), options.keeping(design) if keep else design)
    assert full == pytest.approx(three - two, rel=0.01)
    patches = 2 * 16 * 768
    assert full + last + patches == pytest.approx(two, rel=0.05)


def test_weights_moments_and_average_are_the_optimizer_s():
    model = models.build("deit_tiny_patch16_224")
    optimizer = AdamW(default_groups(model.named_parameters(), 0.05))
    average = Ema(dict(model.named_parameters()), 0.9, model).average
    parts = memory.peak(network_of(vit_of(model)), Work(1, ema=True), FUSED, world=1, parallel="ddp")

    def size(tensors):
        return sum(tensor.nbytes for tensor in tensors)

    assert parts["weights"] == parts["gradients"] == size(model.parameters())
    assert parts["moments"] == size([tensor for moment in optimizer.state.values() for tensor in moment.values()])
    assert parts["ema"] == size(average.values())


def test_sharding_divides_what_belongs_to_parameters():
    def peak(parallel, **options):
        work = Work(8, ema=True, trained=options.pop("trained", None))
        return memory.peak(BASE, work, FUSED, world=8, parallel=parallel, **options)

    whole, sharded = map(peak, ("ddp", "fsdp2"))
    for part in ("weights", "gradients", "moments", "ema"):
        assert sharded[part] == whole[part] / 8
    for part in ("blocks", "logits", "input", "embedding", "casts"):
        assert sharded[part] == whole[part]
    assert (whole["gathered"], sharded["gathered"]) == (0, pytest.approx(16 * BASE.parameters / BASE.vit.depth))
    # Between micro-batches gradients are whole, and what is computed again keeps no copy of its weights.
    assert peak("fsdp2", accumulate=2)["gradients"] == whole["gradients"] == peak("ddp", accumulate=2)["gradients"]
    again = replace(Work(8).of(BASE), recomputed=True)
    assert peak("fsdp2", trained=again)["casts"] == pytest.approx(whole["casts"] / BASE.vit.depth)
    alone = [memory.peak(BASE, Work(8), FUSED, world=1, parallel=parallel) for parallel in ("ddp", "fsdp2")]
    assert alone[0] == alone[1]


def test_an_evaluation_with_fsdp2_has_the_whole_weights():
    """It sets the peak where a step keeps little: many parameters, few images, blocks that are computed again."""
    again = replace(Work(1).of(BASE), recomputed=True)

    def peak(batch, world=64, parallel="fsdp2", teachers=()):
        work = Work(batch, trained=again)
        return memory.peak(BASE, work, FUSED, world=world, parallel=parallel, teachers=teachers)

    assert peak(1)["evaluation"] > 0
    assert memory.total(peak(1)) > 4 * BASE.parameters + sum(
        peak(1)[part] for part in ("weights", "moments", "context")
    )
    assert memory.total(peak(1, teachers=[BASE])) > 8 * BASE.parameters
    assert peak(4096)["evaluation"] == 0, "the step needs more"
    assert peak(1, world=1)["evaluation"] == peak(1, parallel="ddp")["evaluation"] == 0


@pytest.mark.parametrize("network", [BASE, CONVNET], ids=["vit", "convnet"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_the_largest_batch_fits_and_the_next_does_not(network, parallel):
    options = {"world": 8, "parallel": parallel, "teachers": [CONVNET]}
    largest = memory.largest_batch(network, Work(1), EAGER, GPUS["A100"], 64, **options)
    sizes = [memory.total(memory.peak(network, Work(batch), EAGER, **options)) for batch in (largest, largest + 64)]
    assert largest % 64 == 0
    assert sizes[0] <= 0.95 * 80e9 < sizes[1]


def test_the_largest_batch_leaves_room_for_the_weights_of_an_evaluation():
    """On a card that a step of one image fits on, and an evaluation of it does not."""
    work, options = Work(1, trained=replace(Work(1).of(BASE), recomputed=True)), {"world": 64, "parallel": "fsdp2"}
    parts = memory.peak(BASE, work, FUSED, **options)
    needed = memory.total(parts) / 0.95
    for bytes_, fits in ((needed * 1.001, 1), (needed - parts["evaluation"] / 2, 0)):
        assert memory.largest_batch(BASE, work, FUSED, replace(GPUS["A100"], memory=bytes_), 1, **options) == fits


def test_nothing_fits_into_too_little():
    card = replace(GPUS["A100"], memory=memory.GIB)
    assert memory.largest_batch(BASE, Work(1), EAGER, card, 64, world=1, parallel="ddp") == 0


def test_a_teacher_takes_memory():
    without, with_it = (
        memory.peak(BASE, Work(64), FUSED, world=1, parallel="ddp", teachers=teachers) for teachers in ((), (BASE,))
    )
    assert without["teacher"] == 0
    assert with_it["teacher"] > 4 * BASE.parameters
    two = memory.peak(BASE, Work(64), FUSED, world=1, parallel="ddp", teachers=(BASE, BASE))
    assert two["teacher"] - with_it["teacher"] == 4 * BASE.parameters


# ---- communication ---------------------------------------------------------------------------------------------------


def ring_bytes(world, size, *, gather, scatter):
    """Bytes that a process sends when shards of `size` travel round a ring, a shard a turn."""
    turns = (world - 1) * (gather + scatter)
    return turns * size / world


def communicated(world, parallel="ddp", nodes=1, gpu="A100", accumulate=1, network=BASE, **options):
    step = estimate.step(network, Work(128), FUSED, GPUS[gpu])
    options |= {"world": world, "nodes": nodes, "parallel": parallel, "accumulate": accumulate}
    return communication.of_step(network, step, GPUS[gpu], Work(128), **options)


def test_one_gpu_sends_nothing():
    assert communicated(1) == communicated(1, "fsdp2") == (0, 0, 0)


@pytest.mark.parametrize("world", [2, 8, 16])
def test_bytes_are_those_of_rings(world):
    weights = 4 * BASE.parameters
    ddp = ring_bytes(world, weights, gather=1, scatter=1)
    fsdp = [ring_bytes(world, weights, gather=2 * count, scatter=1) for count in (1, 3)]
    assert communicated(world).bytes == pytest.approx(ddp)
    assert [communicated(world, "fsdp2", accumulate=count).bytes for count in (1, 3)] == pytest.approx(fsdp)
    halved = ring_bytes(world, weights, gather=2, scatter=0.5)
    assert communicated(world, "fsdp2", reduced=2).bytes == pytest.approx(halved)
    assert communicated(world, accumulate=3).bytes == communicated(world).bytes
    assert communicated(world, reduced=2) == tuple(figure / 2 for figure in communicated(world))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_some_of_it_shows_and_never_more_than_all(parallel):
    near, far = communicated(8, parallel), communicated(16, parallel, nodes=16)
    for spent in (near, far):
        assert 0 < spent.exposed <= spent.seconds
    assert near.seconds < far.seconds
    assert near.exposed < far.exposed


def test_more_adapters_are_faster():
    assert communicated(16, nodes=2).seconds < communicated(16, nodes=4).seconds < communicated(16, nodes=8).seconds
    assert communication.bus(GPUS["A100"], 16, 2) < communication.bus(GPUS["A100"], 8, 1)


# ---- against measurements --------------------------------------------------------------------------------------------


def test_errors_against_published_speeds_are_within_the_stated_bounds():
    steps, runs = estimate_rows.errors(whole=False), estimate_rows.errors(whole=True)
    assert len(steps) + len(runs) == len(estimate_rows.PUBLISHED)
    assert max(map(abs, steps)) < 0.2
    assert all(0.5 < error < 0.75 for error in runs)


def test_a_gpu_is_known_by_the_name_of_its_card():
    """Cards on PCIe, parts of cards, superchips and other models share names, but not speeds."""
    cards = {
        "V100": ["Tesla V100-SXM2-16GB", "Tesla V100-SXM2-32GB"],
        "A100": ["NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB"],
        "H100": ["NVIDIA H100 80GB HBM3"],
        "H200": ["NVIDIA H200"],
        "RTX3090": ["NVIDIA GeForce RTX 3090"],
        None: [
            *("Tesla V100-PCIE-16GB", "NVIDIA A100 80GB PCIe", "NVIDIA H100 NVL", "NVIDIA H200 NVL", "NVIDIA A100X"),
            *("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "NVIDIA GH200 480GB", "NVIDIA GeForce RTX 3090 Ti", "Quadro P4000"),
        ],
    }
    expected = [(name, gpu) for gpu, names in cards.items() for name in names]
    assert [(name, estimate_rows.known_gpu(name)) for name, _ in expected] == expected


def test_published_rows_have_sources_and_known_gpus():
    for row in estimate_rows.PUBLISHED:
        assert row.gpu in GPUS
        assert row.source
        assert row.speed > 0


def test_the_teacher_s_rows_agree_with_each_other():
    flops = estimate_networks._CONVNET_FLOPS
    for speed, bandwidth in estimate_networks._CONVNET_ROWS:
        assert speed * flops / bandwidth == pytest.approx(estimate_networks.CONVNET_FLOPS_PER_BYTE, rel=0.1)


def bench_row(card="NVIDIA A100-SXM4-80GB", slower=2.0, **changes):
    work = Work(64, changes.get("precision", "fp32"), drop_path=False)
    seconds = slower * sum(estimate.step(BASE, work, FUSED, GPUS["A100"]))
    sides = {"fastdeit": [seconds, 0.9 * seconds, 9 * seconds], "timm": [1.0]}
    row = {"what": "step", "device": "cuda", "model": "base", "batch": 64, "seconds": sides}
    return row | {"environment": {"gpus": [{"name": card}]}} | changes


def calibrated(tmp_path, *rows):
    path = tmp_path / "a100.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return estimate_rows.calibrations([path], {"base": BASE}.get)


def test_own_rows_calibrate(tmp_path):
    found = calibrated(tmp_path, bench_row(slower=2.0), bench_row(slower=0.5), bench_row(precision="bf16", slower=1.5))
    assert found["A100", "fused", "fp32"] == pytest.approx((1.0, 2, 0.5, 2.0))
    assert found["A100", "fused", "bf16"] == pytest.approx((1.5, 1, 1.5, 1.5))
    assert str(found["A100", "fused", "fp32"]) == "measured x1.00 (0.50 to 2.00, 2 rows)"
    assert len(found) == 2


@pytest.mark.parametrize(
    "other",
    [
        {"what": "data"},
        {"device": "cpu", "environment": {"gpus": []}},
        {"card": "NVIDIA A100-PCIE-40GB"},
        {"card": "NVIDIA GH200 480GB"},
        {"card": "NVIDIA L4"},
        {"seconds": {"timm": [1.0]}},
    ],
)
def test_other_rows_do_not(tmp_path, other):
    assert calibrated(tmp_path, bench_row(**other)) == {}


@pytest.mark.parametrize(
    ("card", "gpu"),
    [
        ("Tesla V100-SXM2-32GB", "V100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GeForce RTX 3090", "RTX3090"),
    ],
)
def test_cards_are_known_by_their_names(tmp_path, card, gpu):
    assert list(calibrated(tmp_path, bench_row(card))) == [(gpu, "fused", "fp32")]


def test_the_model_needs_no_torch():
    code = "import sys\nfrom fastdeit.estimate import rows\nprint(rows.errors(whole=False))\n"
    code += "print({'torch', 'numpy', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


class Mixture(Tiny):
    """Its logits are a sum over two heads: no linear layer makes them."""

    head_names = ()

    def forward(self, x, noise=None):
        one, other = super().forward(x)
        return one + other


@pytest.mark.parametrize(
    ("name", "outputs"), [("tests.small_runs:Tiny", 20), ("tests.estimate.test_estimate:Mixture", 10)]
)
def test_logits_count_whether_or_not_linear_layers_make_them(name, outputs):
    assert subject.network(name, None, (8, 8), 10).outputs == outputs
