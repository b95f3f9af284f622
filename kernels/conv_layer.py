"""What describes a packed convolution to the kernels of GPUs: its sizes and its filters."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kernels.packing import WORD_BITS, num_words


@dataclass(frozen=True)
class Geometry:
    """Sizes of a layer, all but the batch; a kernel is compiled for each.

    Attributes:
        height: Rows of the input.
        width: Columns of the input.
        out_height: Rows of the output.
        out_width: Columns of the output.
        channels: Input channels.
        filters: Output channels.
        kernel_h: Rows of the window.
        kernel_w: Columns of the window.
        stride_h: Vertical step of the window.
        stride_w: Horizontal step.
        pad_h: Rows of zeros above and below.
        pad_w: Columns of zeros at both sides.
    """

    height: int
    width: int
    out_height: int
    out_width: int
    channels: int
    filters: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int

    @property
    def words(self) -> int:
        """Words of a pixel."""
        return num_words(self.channels)

    @property
    def tail(self) -> int:
        """Mask of the channels that a pixel's last word holds, as an int32."""
        used = self.channels - (self.words - 1) * WORD_BITS
        return -1 if used == WORD_BITS else (1 << used) - 1

    @property
    def taps(self) -> int:
        """Pixels under a window."""
        return self.kernel_h * self.kernel_w

    @property
    def depth(self) -> int:
        """Words under a window."""
        return self.taps * self.words

    @property
    def has_border(self) -> bool:
        """Whether a window may leave the image."""
        return self.pad_h > 0 or self.pad_w > 0

    @property
    def out_words(self) -> int:
        """Words of a pixel of packed results."""
        return num_words(self.filters)


@dataclass(frozen=True, eq=False)
class Filters:
    """Two-valued filters and what follows their sums.

    Attributes:
        weight_bits: (F, kh, kw, words) int32.
        alpha: (F,) float32.
        beta: (F,) float32.
        bias: (F,) float32, or None.
        threshold: (F,) float32 of packed results, None for values.
        falls: (F,) bool, likewise.
    """

    weight_bits: Tensor
    alpha: Tensor
    beta: Tensor
    bias: Tensor | None
    threshold: Tensor | None = None
    falls: Tensor | None = None


def geometry_of(
    bits_shape: Sequence[int],
    weight_shape: Sequence[int],
    in_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
) -> Geometry:
    """Returns the sizes of a layer; arguments as in `kernels.conv.packed_conv2d`, pairs for stride and padding."""
    _, height, width, _ = bits_shape
    filters, kernel_h, kernel_w, _ = weight_shape
    out_height = (height + 2 * padding[0] - kernel_h) // stride[0] + 1
    out_width = (width + 2 * padding[1] - kernel_w) // stride[1] + 1
    size = (height, width, out_height, out_width, in_channels, filters, kernel_h, kernel_w)
    return Geometry(*size, stride[0], stride[1], padding[0], padding[1])
