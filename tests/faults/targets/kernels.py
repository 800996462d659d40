"""The fused ops."""

from tests.faults.targets.target import Target

TARGETS = (
    Target(
        47,
        "Every op agrees with PyTorch, forward and backward, in every type, layout and mode.",
        (
            "tests/kernels/test_ops.py::test_opcheck",
            "tests/kernels/test_ops.py::test_gradients_are_those_of_the_formula",
            "tests/kernels/test_ops.py::test_arguments_of_any_layout",
            "tests/kernels/test_ops.py::test_compiled_is_eager",
            "tests/kernels/test_attention.py::test_as_good_as_pytorch",
            "tests/kernels/test_layer_norm.py::test_as_good_as_pytorch",
            "tests/kernels/test_mlp.py::test_mlp_as_good_as_pytorch",
            "tests/kernels/test_losses_triton.py::test_as_good_as_pytorch",
            "tests/kernels/test_optimizer_triton.py::test_as_good_as_pytorch",
            "tests/kernels/test_gpu.py::test_compiled_by_inductor_is_eager_mode",
        ),
        why_not="on real kernels it needs a GPU: without one Triton's interpreter runs them",
    ),
    Target(
        48,
        "Where a kernel cannot run, the reason is said once, and the result is the reference's.",
        (
            "tests/kernels/test_selection.py::test_info_has_a_reason_for_every_op",
            "tests/kernels/test_selection.py::test_what_a_backend_does_not_take_goes_to_the_next_with_one_warning",
            "tests/kernels/test_attention.py::test_what_triton_does_not_take_is_the_references",
            "tests/kernels/test_native.py::test_what_the_card_does_not_take_falls_back_once",
        ),
    ),
    Target(
        49,
        "Infinities, NaN, huge, tiny and empty inputs give what PyTorch gives.",
        (
            "tests/kernels/test_attention.py::test_huge_and_tiny_logits",
            "tests/kernels/test_attention.py::test_not_finite_where_pytorch_is_not",
            "tests/kernels/test_layer_norm.py::test_huge_and_tiny_values",
            "tests/kernels/test_layer_norm.py::test_not_finite_where_pytorch_is_not",
            "tests/kernels/test_layer_norm.py::test_no_rows",
            "tests/kernels/test_mlp.py::test_not_finite_where_pytorch_is_not",
            "tests/kernels/test_losses_triton.py::test_huge_and_tiny_logits",
            "tests/kernels/test_losses_triton.py::test_not_finite_where_pytorch_is_not",
            "tests/kernels/test_optimizer_triton.py::test_extreme_numbers",
        ),
        why_not="on real kernels it needs a GPU",
    ),
    Target(
        50,
        "Ops of random shapes agree with PyTorch.",
        (
            "tests/kernels/test_attention.py::test_any_shape",
            "tests/kernels/test_attention.py::test_masks_of_any_size",
            "tests/kernels/test_attention_fused.py::test_any_shape",
        ),
        why_not="a few examples a test, not 200 an op every night",
    ),
)
