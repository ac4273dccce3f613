"""Results that do not depend on what else is in a batch."""

from torch import Tensor


def doubled_if_alone(images: Tensor) -> Tensor:
    """A batch [b, ...] for a network of convolutions, whose first b results are the same to the last bit whatever b is.

    On a CPU, an image alone would be convolved by other kernels, which round otherwise; so it comes twice.
    """
    is_alone = len(images) == 1 and images.device.type == "cpu"
    return images.expand(2, *images.shape[1:]) if is_alone else images
