"""CRD: a student's feature is told from the teacher's features of other examples by the teacher's of its own."""

import math
import random
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from abkd import ranges, ranks
from abkd.errors import InputError
from abkd.features.losses import FeatureLoss, FeatureMethod, unit
from abkd.features.negatives import OtherClasses

Negatives = Literal["other_classes", "all"]


@dataclass(frozen=True)
class CRD(FeatureMethod):
    """contrast(student, teacher's bank) + contrast(teacher, student's bank), see `CRDLoss` and `contrast`.

    Args:
        dim: of the embeddings.
        num_negatives: drawn with replacement for each example of each batch.
        temperature: above 0, divides the cosine of two embeddings.
        momentum: 0 to 1, the share of what a bank holds in what it will hold; 1, which never moves, is excluded.
        negatives: "other_classes" draws them from the classes other than the example's, which needs labels; "all"
            from all examples, now and then the example itself.
        seed: of the initial state and of the negatives.

    Source: Tian, Krishnan and Isola, "Contrastive representation distillation", ICLR 2020, with the negatives, the
        temperature and the momentum of the code's CIFAR-100 runs, where the whole term has weight 0.8.
    """

    dim: int = 128
    num_negatives: int = 16384
    temperature: float = 0.07
    momentum: float = 0.5
    negatives: Negatives = "other_classes"
    kind = "crd"

    def __post_init__(self):
        for name in ("dim", "num_negatives"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InputError(f"{name} must be a whole number above 0, got {getattr(self, name)!r}")
        if not 1e-3 <= ranges.finite("temperature", self.temperature) <= 1e3:
            raise InputError(f"temperature must lie between 1e-3 and 1e3, got {self.temperature!r}")
        if not 0 <= ranges.finite("momentum", self.momentum) < 1:
            raise InputError(f"momentum must lie between 0 and 1, 1 excluded, got {self.momentum!r}")
        if self.negatives not in ("other_classes", "all"):
            raise InputError(f"negatives must be other_classes or all, got {self.negatives!r}")

    def make(self, student_dim: int, teacher_dim: int, num_examples: int, labels: Tensor | None) -> "CRDLoss":
        return CRDLoss(self, student_dim, teacher_dim, num_examples=num_examples, labels=labels)


class CRDLoss(FeatureLoss):
    """`CRD` of one training, see `FeatureLoss`: two embedding heads and a bank of embeddings of all examples for each.

    Each batch is compared with the banks as they were, and then enters them: bank <- unit(momentum * bank +
    (1 - momentum) * embedding), an example that comes several times with its mean. The normalising constants are
    those of the first batch, and stay. Under several ranks the banks take in the examples of all of them, so that all
    ranks hold the same; each draws negatives of its own. A resumed training draws what an uninterrupted one would.

    Memory: both banks, `[num_examples, dim]`, twice during a step, and the batch's similarities with all examples,
    `[batch, num_examples]`, which are fewer numbers than the embeddings of the negatives.
    """

    student_bank: Tensor
    teacher_bank: Tensor
    log_z: Tensor
    num_batches: Tensor

    def __init__(self, method: CRD, student_dim: int, teacher_dim: int, *, num_examples: int, labels: Tensor | None):
        super().__init__(student_dim, teacher_dim, num_examples)
        self.method = method
        self.embed_student = nn.Linear(student_dim, method.dim)
        self.embed_teacher = nn.Linear(teacher_dim, method.dim)
        self.others = OtherClasses(labels, num_examples) if method.negatives == "other_classes" else None
        for name in ("student_bank", "teacher_bank"):  # of length 1 on average
            self.register_buffer(name, (2 * torch.rand(num_examples, method.dim) - 1) * math.sqrt(3 / method.dim))
        self.register_buffer("log_z", torch.zeros(2))  # of the student, of the teacher as the anchor
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.int64))

    def per_sample(self, student: Tensor, teacher: Tensor, example_ids: Tensor) -> Tensor:
        student, teacher = unit(self.embed_student(student)), unit(self.embed_teacher(teacher))
        if len(example_ids) == 0:
            return student.sum(-1) + teacher.sum(-1)
        num_batches = int(self.num_batches)
        ids = torch.cat([example_ids.unsqueeze(-1), self._negatives(example_ids, num_batches)], dim=-1)
        anchors = ((student, self.teacher_bank), (teacher, self.student_bank))
        scores = [(anchor @ bank.mT).gather(-1, ids) / self.method.temperature for anchor, bank in anchors]
        log_z = self.log_z if num_batches else self._log_z(scores)
        log_noise = math.log(self.method.num_negatives / self.num_examples)
        both = [contrast(score - z, log_noise) for score, z in zip(scores, log_z.unbind(), strict=True)]
        if self.training:
            self.log_z, self.num_batches = log_z, self.num_batches + 1
            self._remember(example_ids, student.detach(), teacher.detach())
        return both[0] + both[1]

    def _negatives(self, example_ids: Tensor, num_batches: int) -> Tensor:
        """Ids `[batch, num_negatives]`, decided by seed, batch and rank alone."""
        dice = random.Random(f"{self.method.seed}/{num_batches}/{ranks.rank()}")
        generator = torch.Generator(example_ids.device).manual_seed(dice.getrandbits(63))
        shape = (len(example_ids), self.method.num_negatives)
        large = torch.randint(2**62, shape, generator=generator, device=example_ids.device)
        return large % self.num_examples if self.others is None else self.others.draw(example_ids, large)

    def _log_z(self, scores: list[Tensor]) -> Tensor:
        """ln Z, Z = num_examples * mean e^score over the batches, of one size, of all ranks."""
        means = [score.detach().logsumexp((0, 1)) - math.log(score.numel()) for score in scores]
        of_all = torch.stack(ranks.gather(torch.stack(means).cpu()))  # [ranks, 2]
        return (of_all.logsumexp(0) - math.log(len(of_all)) + math.log(self.num_examples)).to(self.log_z)

    @torch.no_grad()
    def _remember(self, example_ids: Tensor, student: Tensor, teacher: Tensor) -> None:
        if ranks.num_ranks() > 1:
            parts = zip(*ranks.gather([x.cpu() for x in (example_ids, student, teacher)]), strict=True)
            example_ids, student, teacher = (torch.cat(list(part)).to(example_ids.device) for part in parts)
        ids, place, count = example_ids.unique(return_inverse=True, return_counts=True)
        for name, embedding in (("student_bank", student), ("teacher_bank", teacher)):
            bank, momentum = getattr(self, name), self.method.momentum
            mean = bank.new_zeros(len(ids), self.method.dim).index_add(0, place, embedding) / count.unsqueeze(-1)
            mixed = unit(momentum * bank[ids] + (1 - momentum) * mean)
            setattr(self, name, bank.index_copy(0, ids, mixed))  # another tensor: the backward needs the old one


def contrast(scores: Tensor, log_noise: float) -> Tensor:
    """-ln h_0 - sum_{k >= 1} ln(1 - h_k), h_k = e^scores_k / (e^scores_k + e^log_noise): `[batch]`, nats.

    Args:
        scores: `[batch, 1 + negatives]`, cosine / temperature - ln Z; the positive first.
        log_noise: ln(number of negatives / number of examples).

    Source: as `CRD`, the critic h of its loss; its code adds 1e-7 to the denominator, which is left out.
    """
    odds = scores - log_noise
    return -logsigmoid(odds[:, 0]) - logsigmoid(-odds[:, 1:]).sum(-1)
