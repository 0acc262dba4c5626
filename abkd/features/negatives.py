"""Which examples an example is told apart from."""

import torch
from torch import Tensor, nn

from abkd.errors import InputError


class OtherClasses(nn.Module):
    """Draws examples of other classes, uniformly; holds the examples in the order of their classes."""

    label: Tensor
    by_class: Tensor
    first: Tensor
    size: Tensor

    def __init__(self, labels: Tensor | None, num_examples: int):
        super().__init__()
        if labels is None:
            raise InputError("negatives=other_classes needs the labels of the training data; set negatives=all")
        if labels.shape != (num_examples,) or labels.dtype != torch.int64:
            found = f"{labels.dtype} {list(labels.shape)}"
            raise InputError(f"labels must be int64 [num_examples] = [{num_examples}], got {found}")
        _, label, size = labels.cpu().unique(return_inverse=True, return_counts=True)
        if len(size) < 2:
            raise InputError(f"negatives=other_classes needs two classes, got {len(size)}; set negatives=all")
        by_class, first = label.argsort(stable=True), size.cumsum(0) - size
        for name, table in (("label", label), ("by_class", by_class), ("first", first), ("size", size)):
            self.register_buffer(name, table, persistent=False)

    def draw(self, example_ids: Tensor, large: Tensor) -> Tensor:
        """Ids `[batch, any]` from uniform integers of that shape, each far above the number of examples."""
        label = self.label[example_ids].unsqueeze(-1)
        place = large % (len(self.label) - self.size[label])
        return self.by_class[place + self.size[label] * (place >= self.first[label])]
