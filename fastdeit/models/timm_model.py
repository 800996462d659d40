"""Any timm model under the contract of fastdeit's models: as a student, as a teacher, as the peer in a comparison.

timm's code computes; this adapter only gives it the contract's face. Drop-path and dropout inside draw from torch's own
generator, so unlike fastdeit's models the result of training with them depends on the number of processes.
"""

import re
from collections.abc import Callable, Mapping

import timm
from torch import Tensor, nn

from fastdeit.models.contract import ImageSize, counted_flops, did_you_mean, refuse_patches, size_pair, split_decay

_DIST_HEAD = re.compile(r"(^|\.)heads?_dist\.")


class TimmModel(nn.Module):
    """The timm model `name`.

    image_size   int or (height, width); None for the model's own. Models that work at any size ignore it
    num_classes  None for the model's own
    drop_path    timm's `drop_path_rate`
    pretrained   timm's weights, which timm downloads once

    Distilled models return (class, distillation) logits in train and eval mode alike; timm averages them in eval mode.
    Raises ValueError for a name that timm does not know, and for options that the model does not take.
    """

    patch_size = None
    noise_per_sample = 0

    def __init__(
        self,
        name: str,
        *,
        image_size: ImageSize | None = None,
        num_classes: int | None = None,
        drop_path: float = 0.0,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        inner = _create(name, image_size, num_classes, drop_path, pretrained)
        # The adapter has no tensors of its own: it shares timm's registries instead of holding timm's model as a child,
        # so that the names of parameters and of the state dict are timm's everywhere, without a prefix to add and
        # strip.
        self.__dict__["inner"] = inner
        for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[registry] = inner.__dict__[registry]
        self.name = name
        self.image_size = size_pair(image_size or inner.pretrained_cfg["input_size"][1:], "image_size")
        self.distilled = any(_DIST_HEAD.search(key) for key, _ in self.named_parameters())
        if self.distilled:
            inner.set_distilled_training(True)
        self.train()

    def train(self, mode: bool = True) -> "TimmModel":
        """Training or eval mode.

        timm returns both logits only where `training` is set, so the flag of the module that asks stays set; dropout,
        drop-path and batch norm are modules below it and follow `mode`.
        """
        self.inner.train(mode)
        self.training = mode
        if self.distilled:
            for module in self.inner.modules():
                if hasattr(module, "distilled_training"):
                    module.training = True
        return self

    @property
    def mean(self) -> tuple[float, ...]:
        """Channel means of the input normalisation the published weights expect, in units of [0, 1]."""
        return tuple(self.inner.pretrained_cfg["mean"])

    @property
    def std(self) -> tuple[float, ...]:
        """Channel standard deviations, as `mean`."""
        return tuple(self.inner.pretrained_cfg["std"])

    @property
    def grid(self) -> tuple[int, int] | None:
        """(rows, columns) of patches of the positional embedding; None for a model without patches."""
        return getattr(getattr(self.inner, "patch_embed", None), "grid_size", None)

    @property
    def prefix_tokens(self) -> int:
        """Slots of the positional embedding before those of the patches."""
        return 0 if getattr(self.inner, "no_embed_class", False) else getattr(self.inner, "num_prefix_tokens", 0)

    @property
    def head_names(self) -> tuple[str, ...]:
        """Names of the linear layers whose output is logits."""
        classifier = self.inner.pretrained_cfg["classifier"]
        return (classifier,) if isinstance(classifier, str) else tuple(classifier)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, or (class, distillation) logits, of float images `[B, C, H, W]`; `noise` is accepted and unused."""
        refuse_patches(x, f"timm's {self.name}")
        return self.inner(x)

    def tokens(
        self,
        x: Tensor,
        *,
        at: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
        stop: int | None = None,
        keep: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """timm's `forward_features(x)`; raises NotImplementedError for `at`, `stop` and `keep`."""
        for option, value in (("at", at), ("stop", stop), ("keep", keep)):
            if value is not None:
                raise NotImplementedError(
                    f"tokens({option}=...) is not possible with timm's {self.name}: its blocks run inside timm's code; "
                    "use a model of fastdeit.models (model.name instead of model.timm)"
                )
        refuse_patches(x, f"timm's {self.name}")
        return self.inner.forward_features(x)

    def classify(self, tokens: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """timm's `forward_head`: logits of what `tokens` returned."""
        return self.inner.forward_head(tokens)

    def decay_groups(self, decay_dist_token: bool = False) -> tuple[list[str], list[str]]:
        """Names of the parameters `(with, without)` weight decay: without are 1-D, biases, and what timm lists.

        `decay_dist_token=True` decays the distillation token as DeiT's public code does.
        """
        exempt = set(self.inner.no_weight_decay()) if hasattr(self.inner, "no_weight_decay") else set()
        return split_decay(self, exempt - {"dist_token"} if decay_dist_token else exempt)

    def shard_units(self) -> list[nn.Module]:
        """The blocks of a timm transformer; none, so that the model is one unit, where timm has no `blocks`."""
        return list(getattr(self.inner, "blocks", ()))

    def flops(self, image_size: ImageSize | None = None) -> int:
        """Floating-point operations (2 per multiply-add) of `forward` for one image, as `contract.counted_flops`."""
        size = self.image_size if image_size is None else size_pair(image_size, "image_size")
        return counted_flops(self, (1, self.inner.pretrained_cfg["input_size"][0], *size))


def _create(
    name: str, image_size: ImageSize | None, num_classes: int | None, drop_path: float, pretrained: bool
) -> nn.Module:
    if not timm.is_model(name):
        hint = did_you_mean(name.split(".")[0], timm.list_models())
        raise ValueError(f"timm {timm.__version__} has no model {name!r}{hint or '; see timm.list_models()'}")
    options = {}
    if num_classes is not None:
        options["num_classes"] = num_classes
    if drop_path:
        options["drop_path_rate"] = drop_path
    config = timm.get_pretrained_cfg(name)
    if image_size is not None and config is not None and config.fixed_input_size:
        options["img_size"] = size_pair(image_size, "image_size")
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except TypeError as error:
        raise ValueError(f"timm's {name} cannot be built with {options}: {error}") from error
