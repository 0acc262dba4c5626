"""The paper's statements on the log mass ratio, executable: rows in, for each row whether premises and conclusion hold.

p is the teacher, q the student, LogR(y) = ln q'(y) - ln q(y) of one step on the logits, see `abkd.analysis.log_ratio`.
The theorems compare two classes y1 and y2 of a row through Delta = LogR(y1) - LogR(y2), under two divergences. Which
of them hold as printed, and the counter-examples to those that do not, are in docs/theorems.md.

Source: Wang et al., "ABKD", ICML 2025, Prop. 3.1 and 4.2, App. D, F and G.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from abkd.analysis.log_ratio import confidence, hardness, log_ratio, logit_gradient, normaliser
from abkd.divergences import FORWARD_KL, REVERSE_KL, AlphaBeta, alpha_divergence
from abkd.errors import InputError

ROUNDING = 1e-12
"""What a conclusion may fail by and still hold: of the numbers compared and the step size."""


class Verdict(NamedTuple):
    """`[N]` for a statement on rows, `[N, vocab]` for one on classes."""

    premises: Tensor
    """bool: the statement says something here. All probabilities that it looks at are above 0."""
    conclusion: Tensor
    """bool: slack >= 0, to rounding."""
    slack: Tensor
    """fp64: the side that is to be larger, minus the other one."""

    @property
    def counterexamples(self) -> Tensor:
        """bool: the premises hold and the conclusion does not."""
        return self.premises & ~self.conclusion


class Rows(NamedTuple):
    """Log-probabilities `[N, vocab]` and two different classes of each row, `[N]`."""

    student: Tensor
    teacher: Tensor
    first: Tensor
    second: Tensor

    @property
    def pairs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """p(y1), p(y2), q(y1), q(y2), `[N]` each, in fp64."""
        p1, p2, q1, q2 = (
            row.double().gather(-1, index.unsqueeze(-1)).squeeze(-1).exp()
            for row in (self.teacher, self.student)
            for index in (self.first, self.second)
        )
        return p1, p2, q1, q2


@dataclass(frozen=True)
class Constants:
    """The "appropriate positive constants" of the theorems: numbers, or one for each row."""

    zeta: float | Tensor = 0.01
    delta_1: float | Tensor = 0.01
    delta_2: float | Tensor = 0.01
    c0: float | Tensor = 1.1
    c1: float | Tensor = 0.9


def proposition_4_2(*, student: Tensor, teacher: Tensor, alpha: float, beta: float, step_size: float = 1.0) -> Verdict:
    """|LogR(y)| <= eta (q(y)^beta h(y) + q(y) sum_k q(k)^beta h(k)) + |N|, h(k) = |p(k)^alpha - q(k)^alpha| / alpha.

    Args:
        student, teacher: log-probabilities, `[N, vocab]`.
        step_size: eta.

    Returns:
        `[N, vocab]`. At (0, 1) this is Prop. 3.1 for the reverse KL, on the line alpha + beta = 1 Prop. F.2.
    """
    pulls = confidence(student=student, beta=beta) * hardness(student=student, teacher=teacher, alpha=alpha)
    bound = pulls + student.double().exp() * pulls.sum(-1, keepdim=True)
    return _bounded(AlphaBeta(alpha, beta), student, teacher, bound, step_size)


def proposition_3_1(*, student: Tensor, teacher: Tensor, reverse: bool, step_size: float = 1.0) -> Verdict:
    """|LogR(y)| <= eta |p(y) - q(y)| + |N| for the forward KL; for the reverse one `proposition_4_2` at (0, 1)."""
    if reverse:
        return proposition_4_2(student=student, teacher=teacher, alpha=0.0, beta=1.0, step_size=step_size)
    bound = (teacher.double().exp() - student.double().exp()).abs()
    return _bounded(FORWARD_KL, student, teacher, bound, step_size)


def proposition_f_2(*, student: Tensor, teacher: Tensor, alpha: float, step_size: float = 1.0) -> Verdict:
    """`proposition_4_2` on the line of the alpha-divergences, beta = 1 - alpha."""
    return proposition_4_2(student=student, teacher=teacher, alpha=alpha, beta=1 - alpha, step_size=step_size)


def theorem_3_2(case: int, rows: Rows, constants: Constants | None = None) -> Verdict:
    """Delta of the reverse KL >= Delta of the forward KL, in one of four cases (App. G.2):

    1. q(y1) = q(y2), p(y2) < delta_1 < q(y1) < p(y1), p(y1) >= p(y2) + zeta: y1 is under-, y2 over-estimated;
    2. q(y1) = q(y2) <= 1 - delta_2, p(y1) < q(y1), p(y1) >= p(y2) + zeta: both are over-estimated;
    3. p(y1) = p(y2) > c0 q(y1), q(y2) + zeta <= q(y1) <= 1 - delta_2: both are under-estimated;
    4. p(y1) = p(y2) between c0 q(y2) and c1 q(y1), q(y2) + zeta <= q(y1) <= 1 - delta_2.
    """
    return _ordered(_premises(case, rows, constants or Constants()), rows, REVERSE_KL, FORWARD_KL)


def theorem_f_3(
    case: int, rows: Rows, constants: Constants | None = None, *, alphas: tuple[float, float] = (0.2, 0.8)
) -> Verdict:
    """Delta of the alpha-divergence at alphas[0] >= Delta at alphas[1]; cases as in `theorem_3_2`, its (0, 1).

    Args:
        alphas: 0 <= alphas[0] < alphas[1] <= 1.
    """
    smaller, larger = (alpha_divergence(alpha) for alpha in _ascending("alphas", alphas, 0.0, 1.0))
    return _ordered(_premises(case, rows, constants or Constants()), rows, smaller, larger)


def theorem_d_1(
    case: int,
    rows: Rows,
    constants: Constants | None = None,
    *,
    alphas: tuple[float, float] = (0.2, 0.8),
    beta: float = 0.7,
) -> Verdict:
    """Delta at (alphas[0], beta) >= Delta at (alphas[1], beta), in one of two cases (App. G.6):

    1. delta_1 < q(y1) = q(y2) <= p(y1), p(y1) >= p(y2) + zeta;
    2. p(y1) < q(y1) = q(y2) <= 1 - delta_2, p(y1) >= p(y2) + zeta.
    """
    constants = constants or Constants()
    p1, p2, q1, q2 = rows.pairs
    premises = {1: (constants.delta_1 < q1) & (q1 <= p1), 2: (p1 < q1) & (q1 <= 1 - constants.delta_2)}
    if case not in premises:
        raise InputError(f"case must be 1 or 2, got {case!r}; the third one is confidence_focus")
    together = premises[case] & (q1 == q2) & (p1 >= p2 + constants.zeta)
    smaller, larger = (AlphaBeta(alpha, beta) for alpha in _ascending("alphas", alphas, 0.0, 1.0))
    return _ordered(together, rows, smaller, larger)


def confidence_focus(
    *,
    student: Tensor,
    teacher: Tensor,
    alpha: float = 0.2,
    betas: tuple[float, float] = (0.2, 0.7),
    of: Literal["weights", "gradient"] = "weights",
) -> Verdict:
    """Thm. D.1, case 3, as an inequality: sum_k s(k) ln q(k) does not fall from betas[0] to betas[1].

    The paper says that a larger beta looks more at the classes that the student is confident of, and argues with the
    weighting q^beta of its bound.

    Args:
        student, teacher: log-probabilities, `[N, vocab]`.
        betas: betas[0] < betas[1].
        of: what s is the share of, class by class: the "weights" q^beta h of the bound, or |dD/dz|, the "gradient".

    Returns:
        `[N]`; the slack in nats.
    """
    first, second = (
        _mean_log_confidence(student, teacher, AlphaBeta(alpha, beta), of)
        for beta in _ascending("betas", betas, -torch.inf, torch.inf)
    )
    premises = (student.isfinite() & teacher.isfinite()).all(-1) & (student != teacher).any(-1)
    return _verdict(premises, second, first)


def logarithmic_mean(a: Tensor, b: Tensor) -> Tensor:
    """(a - b) / (ln a - ln b), a at a = b. Case 1 of Thm. 3.2 holds where q(y1) is above that of p(y1) and p(y2)."""
    return torch.where(a == b, a, (a - b) / (a / b).log().masked_fill(a == b, 1.0))


def identric_mean(a: Tensor, b: Tensor) -> Tensor:
    """exp((a ln a - b ln b) / (a - b) - 1), a at a = b. Case 4 of Thm. 3.2 holds where ln p(y1) + KL(q || p) is above
    the logarithm of that of q(y1) and q(y2)."""
    return torch.where(a == b, a, ((a.xlogy(a) - b.xlogy(b)) / (a - b).masked_fill(a == b, 1.0) - 1).exp())


def _premises(case: int, rows: Rows, c: Constants) -> Tensor:
    """The four cases of Thm. 3.2 and Thm. F.3, `[N]`."""
    p1, p2, q1, q2 = rows.pairs
    apart, moderate = q2 + c.zeta <= q1, q1 <= 1 - c.delta_2
    premises = {
        1: (q1 == q2) & (p2 < c.delta_1) & (c.delta_1 < q1) & (q1 < p1) & (p1 >= p2 + c.zeta),
        2: (q1 == q2) & (p1 < q1) & moderate & (p1 >= p2 + c.zeta),
        3: apart & moderate & (p1 == p2) & (p1 > c.c0 * q1),
        4: apart & moderate & (p1 == p2) & (c.c0 * q2 < p1) & (p1 < c.c1 * q1),
    }
    if case not in premises:
        raise InputError(f"case must be 1, 2, 3 or 4, got {case!r}")
    return premises[case]


def _ordered(premises: Tensor, rows: Rows, larger: AlphaBeta, smaller: AlphaBeta) -> Verdict:
    positive = torch.stack(rows.pairs).amin(0) > 0
    return _verdict(premises & positive, _difference(rows, larger), _difference(rows, smaller))


def _difference(rows: Rows, divergence: AlphaBeta) -> Tensor:
    """Delta / eta, `[N]`: it is proportional to the step size."""
    gradient = logit_gradient(divergence, student=rows.student, teacher=rows.teacher)
    ratios = log_ratio(rows.student, gradient, 1.0)
    first, second = (ratios.gather(-1, index.unsqueeze(-1)).squeeze(-1) for index in (rows.first, rows.second))
    return first - second


def _bounded(divergence: AlphaBeta, student: Tensor, teacher: Tensor, bound: Tensor, step_size: float) -> Verdict:
    """|LogR| <= step_size * bound + |N|, class by class."""
    gradient = logit_gradient(divergence, student=student, teacher=teacher)
    ratio = log_ratio(student, gradient, step_size)
    positive = (student.isfinite() & teacher.isfinite()).all(-1, keepdim=True).expand_as(ratio)
    shared = normaliser(student, gradient, step_size).abs()
    return _verdict(positive, step_size * bound + shared, ratio.abs(), step_size)


def _mean_log_confidence(student: Tensor, teacher: Tensor, divergence: AlphaBeta, of: str) -> Tensor:
    if of == "weights":
        factor = hardness(student=student, teacher=teacher, alpha=divergence.alpha)
        sizes = confidence(student=student, beta=divergence.beta) * factor
    else:
        sizes = logit_gradient(divergence, student=student, teacher=teacher).abs()
    return (sizes * student.double()).sum(-1) / sizes.sum(-1)


def _verdict(premises: Tensor, larger: Tensor, smaller: Tensor, step_size: float = 1.0) -> Verdict:
    slack = larger - smaller
    return Verdict(premises, slack >= -ROUNDING * (larger.abs() + smaller.abs() + step_size), slack)


def _ascending(name: str, pair: tuple[float, float], low: float, high: float) -> tuple[float, float]:
    if not low <= pair[0] < pair[1] <= high:
        raise InputError(f"{name} must be two numbers in ascending order between {low:g} and {high:g}, got {pair!r}")
    return pair
