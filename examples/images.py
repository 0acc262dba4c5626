"""Distils a ResNet-14 into a ResNet-8 on gratings of ten directions under noise, in under a minute on a CPU."""

import argparse
import tempfile

import numpy as np
from torch.optim import SGD
from transformers import TrainingArguments

from abkd import AlphaBeta, Objective
from abkd.calibrations import Plain
from abkd.data.images import Augmentation, ImageStore
from abkd.data.labelled_images import LabelledImages
from abkd.models.classifiers import load_classifier
from abkd.teachers.classifier import ClassifierTeacher
from abkd.trainer import ImageDistillationTrainer

CLASSES = tuple(f"{18 * number} degrees" for number in range(10))


def gratings(num, seed, size=16):
    rng = np.random.default_rng(seed)
    labels, (rows, columns) = np.arange(num) % len(CLASSES), np.mgrid[:size, :size]
    angles, phases = (np.pi * labels / len(CLASSES))[:, None, None], rng.uniform(0, 6.3, (num, 1, 1))
    waves = np.sin(1.2 * (rows * np.sin(angles) + columns * np.cos(angles)) + phases)
    pixels = 128 + 50 * waves[..., None] + rng.normal(0, 50, (num, size, size, 3))
    return ImageStore(LabelledImages(pixels.clip(0, 255).astype(np.uint8), labels, CLASSES))


def network(name, seed):
    half = (0.5, 0.5, 0.5)
    return load_classifier(kind="cifar", name=name, num_classes=len(CLASSES), mean=half, std=half, seed=seed)


def trainer(model, teacher, objective, steps, folder):
    return ImageDistillationTrainer(
        model=model, teacher=teacher, objective=objective, train_images=gratings(2000, 0),
        validation_images=gratings(500, 1), augmentation=Augmentation(crop_padding=2, flip=False),
        make_optimizer=lambda weights: SGD(weights, lr=0.1, momentum=0.9), rate_factor=lambda epoch: 1.0,
        args=TrainingArguments(folder, max_steps=steps, per_device_train_batch_size=32, max_grad_norm=0,
                               logging_steps=20, save_strategy="no", report_to="none", disable_tqdm=True),
    )  # fmt: skip


def main(steps):
    with tempfile.TemporaryDirectory() as folder:
        teacher, student = network("resnet14", 0), network("resnet8", 1)
        trainer(teacher, None, Objective(kd_weight=0.0, ce_weight=1.0), steps, folder).train()
        objective = Objective(Plain(AlphaBeta(alpha=0.8, beta=0.3), temperature=4.0), kd_weight=10.0, ce_weight=1.0)
        distilling = trainer(student, ClassifierTeacher(teacher), objective, steps, folder)
        before, _, after = distilling.evaluate(), distilling.train(), distilling.evaluate()
    for name in ("alpha_beta", "top1", "agreement"):
        print(f"{name}: {before[f'validation_{name}']:.4f} before, {after[f'validation_{name}']:.4f} after")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)
