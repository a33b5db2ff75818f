"""Tables bound to the size of the image: the module that owns them makes those of a file fit."""

from torch import Tensor


class Resizable:
    """Mixed into an `nn.Module` some of whose own parameters or buffers may have another size in a file."""

    def resized(self, name: str, value: Tensor) -> Tensor:
        """The parameter or buffer `name` of this module from a `value` of another size.

        Raises:
            ValueError: it cannot be told how.
        """
        return value
