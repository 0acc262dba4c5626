"""The teacher of images: frozen, in evaluation mode, asked once for each key where it remembers."""

import torch
from torch import nn

from abkd.teachers.classifier import ClassifierTeacher


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.num_seen = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.Dropout(0.5)), 0

    def forward(self, images):
        self.num_seen += len(images)
        return self.layer(images)


def test_it_is_frozen_and_deterministic():
    model = Counting().train()
    teacher, images, keys = ClassifierTeacher(model), torch.rand(4, 3, 2, 2), torch.arange(4)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    logits = teacher.logits(images, keys)
    assert not logits.requires_grad and torch.equal(logits, model(images))


def test_it_is_asked_once_for_each_key():
    model = Counting()
    teacher, images, keys = ClassifierTeacher(model, remember=True), torch.rand(4, 3, 2, 2), torch.tensor([7, 3, 9, 1])
    logits = teacher.logits(images, keys)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(teacher.logits(torch.zeros(4, 3, 2, 2), keys[order]), logits[order])
    assert model.num_seen == 4
    other = teacher.logits(images + 1, keys + 100)  # another epoch's keys are other images
    assert model.num_seen == 8 and not torch.equal(other, logits)
