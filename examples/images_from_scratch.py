"""Distils a convolutional network into a smaller one in plain PyTorch; of abkd there is the divergence alone."""

import argparse

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from abkd import alpha_beta

NUM_CLASSES = 10


def gratings(num, generator, size=16):
    """Waves in ten directions under noise, `[num, 1, size, size]`, and which direction it is."""
    labels, place = torch.randint(NUM_CLASSES, (num, 1, 1), generator=generator), torch.arange(size)
    angles, phases = torch.pi * labels / NUM_CLASSES, 6.3 * torch.rand(num, 1, 1, generator=generator)
    waves = torch.sin(1.2 * (place[:, None] * angles.sin() + place * angles.cos()) + phases)
    return waves[:, None] + torch.randn(num, 1, size, size, generator=generator), labels.flatten()


def network(width):
    layers = []
    for channels in (1, width, width):
        layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width, NUM_CLASSES))


def divergence(student, teacher, temperature=1.0):
    p, q = (teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)
    return alpha_beta(student=q, teacher=p, alpha=0.8, beta=0.3).mean()


def train(model, loss_of, steps, generator):
    optimizer = torch.optim.Adam(model.train().parameters(), lr=5e-3)
    for _ in range(steps):
        images, labels = gratings(64, generator)
        optimizer.zero_grad()
        loss_of(model(images), images, labels).backward()
        optimizer.step()
    model.eval()


def main(steps):
    torch.manual_seed(0)
    generator, teacher, student = torch.Generator().manual_seed(0), network(64), network(16).eval()
    train(teacher, lambda logits, images, labels: cross_entropy(logits, labels), steps, generator)
    images, labels = gratings(1000, generator)
    before, target = student(images).detach(), teacher.requires_grad_(False)(images)
    train(student, lambda logits, images, labels: 10 * divergence(logits, teacher(images), 4.0), steps, generator)
    for name, logits in (("before", before), ("after", student(images).detach()), ("of the teacher", target)):
        accuracy = (logits.argmax(-1) == labels).float().mean()
        print(f"alpha_beta: {divergence(logits, target):.4f} {name}, accuracy {accuracy:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)
