"""The network of the CIFAR-10 speed records."""

from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

ACTIVATIONS = {"gelu": nn.GELU, "silu": nn.SiLU, "relu": nn.ReLU}


class SpeedNet(nn.Module):
    """A whitening layer that is not trained, then groups of two or three 3x3 convolutions, the first followed by 2x2 max-pooling.

    The network of airbench94 (Jordan 2024, https://arxiv.org/abs/2404.00498, sections 3.1 to 3.3) with its later widths,
    (64, 256, 256); with groups of three, of airbench96. Convolutions begin as the identity on their first channels;
    BatchNorm has no scale, and its statistics forget quickly, for runs of a few hundred steps.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        widths: list[PositiveInt] = [64, 256, 256],  # noqa: B006 (only read)
        depths: list[Literal[2, 3]] | None = None,
        activation: Literal["gelu", "silu", "relu"] = "gelu",
        whiten_bias: bool = True,
        norm_momentum: Annotated[float, Field(gt=0, le=1)] = 0.4,
    ) -> None:
        """Take `image_shape` (channels, height, width), each group's channels and its number of convolutions (None: two).

        `whiten_bias=False` trains no bias of the first layer either, so that nothing is to be computed back to it.
        ValueError where the images are too small for so many groups, or `depths` is not as long as `widths`.
        """
        super().__init__()
        channels, height, width = image_shape
        if (min(height, width) - 1) >> len(widths) == 0:
            raise ValueError(f"model.widths={widths}: images of {height} x {width} can't be halved {len(widths)} times")
        depths = depths or [2] * len(widths)
        if len(depths) != len(widths):
            raise ValueError(f"model.depths={depths}: needs one number for each of model.widths={widths}")
        self.whiten = nn.Conv2d(channels, 8 * channels, 2, bias=whiten_bias)
        self.whiten.weight.requires_grad = False
        self.activation = ACTIVATIONS[activation]()
        into = [8 * channels, *widths]
        self.groups = nn.Sequential(
            *(
                ConvGroup(*sizes, self.activation, norm_momentum)
                for sizes in zip(into[:-1], widths, depths, strict=True)
            )
        )
        self.head = nn.Linear(widths[-1], num_classes, bias=False)
        with torch.no_grad():
            self.head.weight /= self.head.weight.std() * widths[-1]

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Set the first layer to whiten the 2x2 patches of normalised training images `(n, channels, height, width)`.

        Its filters are the eigenvectors of the patches' covariance, each divided by the root of its eigenvalue, and the
        same with the other sign.
        """
        patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / (values + 5e-4).sqrt()).T.view(-1, *self.whiten.weight.shape[1:])
        self.whiten.weight.copy_(torch.cat((filters, -filters)))

    def forward(self, images: Tensor) -> Tensor:
        """Map float images `(b, channels, height, width)` to logits `(b, num_classes)`."""
        x = self.groups(self.activation(self.whiten(images)))
        return self.head(x.amax((2, 3)))


class ConvGroup(nn.Module):
    """Convolution, 2x2 max-pooling, BatchNorm, activation; then the same without pooling, once or twice.

    A third convolution is residual: before its activation, what the first has given is added.
    """

    def __init__(self, into: int, width: int, depth: int, activation: nn.Module, norm_momentum: float) -> None:
        """Map `into` channels to `width` by `depth` convolutions, two or three."""
        super().__init__()
        self.conv1 = nn.Conv2d(into, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width, eps=1e-12, momentum=norm_momentum)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width, eps=1e-12, momentum=norm_momentum)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False) if depth == 3 else None
        self.norm3 = nn.BatchNorm2d(width, eps=1e-12, momentum=norm_momentum) if depth == 3 else None
        for layer in self.children():
            if isinstance(layer, nn.Conv2d):
                nn.init.dirac_(layer.weight.data[: layer.in_channels])
            else:
                layer.weight.requires_grad = False
        self.pool = nn.MaxPool2d(2)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Map `(b, into, h, w)` to `(b, width, h // 2, w // 2)`."""
        first = self.activation(self.norm1(self.pool(self.conv1(x))))
        x = self.activation(self.norm2(self.conv2(first)))
        if self.conv3 is None or self.norm3 is None:
            return x
        return self.activation(self.norm3(self.conv3(x)) + first)
