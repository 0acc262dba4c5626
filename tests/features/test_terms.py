import pytest
import torch
from torch import nn

from abkd.errors import InputError
from abkd.features import CRD, ITRD, METHODS, FeatureTerm
from abkd.objective import Objective

IMAGES = torch.linspace(-1, 1, 6 * 3 * 4 * 4).reshape(6, 3, 4, 4).sin()
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
IDS = torch.arange(6)
SMALL_CRD = CRD(dim=4, num_negatives=5)


def net(width):
    body = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.5))
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))


def attach(method, student, teacher, **options):
    term = FeatureTerm(method, **({"student_layer": "3", "teacher_layer": "3"} | options))
    return term.attach(student, teacher, lambda model: model(IMAGES), num_examples=6, labels=LABELS)


@pytest.mark.parametrize("method", [SMALL_CRD, ITRD()])
def test_a_term_is_the_method_of_both_features(method):
    student, teacher = net(4).eval(), net(7).eval()
    attached = attach(method, student, teacher, weight=0.8)
    alone = method.build(4, 7, num_examples=6, labels=LABELS)
    alone.load_state_dict(attached.loss.state_dict())
    student(IMAGES), teacher(IMAGES)
    expected = alone(student[:3](IMAGES), teacher[:3](IMAGES), IDS)
    assert torch.equal(attached(IDS), expected) and attached.weight == 0.8
    with pytest.raises(InputError, match="no forward pass has been through '3'"):
        attached(IDS)


@pytest.mark.parametrize("method", [SMALL_CRD, ITRD()])
def test_a_training_with_a_term_moves_student_and_embeddings(method):
    student, teacher = net(4), net(7).eval()
    attached = attach(method, student, teacher)
    trained = [*student.parameters(), *attached.parameters()]
    before = [parameter.clone() for parameter in trained]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    objective, values = Objective(ce_weight=1.0), []
    for _ in range(30):
        with torch.no_grad():
            teacher_logits = teacher(IMAGES)
        loss = objective(
            student_logits=student(IMAGES), teacher_logits=teacher_logits, labels=LABELS, num_tokens=len(IDS)
        )
        feature_loss = attached(IDS).sum() / len(IDS)
        optimizer.zero_grad()
        (loss.total + attached.weight * feature_loss).backward()
        optimizer.step()
        values.append(feature_loss.item())
    assert all((new != old).any() for new, old in zip(trained, before, strict=True))
    assert sum(values[-5:]) < sum(values[:5])


def test_the_embeddings_are_no_part_of_the_student():
    student = net(4)
    keys = list(student.state_dict())
    attached = attach(SMALL_CRD, student, net(7))
    assert list(student.state_dict()) == keys
    mine = {id(parameter) for parameter in attached.parameters()}
    assert len(mine) == 4 and not mine & {id(parameter) for parameter in student.parameters()}
    assert "loss.student_bank" in attached.state_dict()


def test_attaching_leaves_the_models_and_the_random_state_as_they_were():
    student, teacher = net(4).train(), net(7).eval()
    student[0][1].eval()  # a frozen normalisation inside a model that trains
    modes = [module.training for module in student.modules()]
    states = [{name: value.clone() for name, value in model.state_dict().items()} for model in (student, teacher)]
    drawn = torch.get_rng_state()
    attached = attach(SMALL_CRD, student, teacher)
    assert [module.training for module in student.modules()] == modes and not teacher.training
    for model, state in zip((student, teacher), states, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)
    attached.detach()
    assert not any(m._forward_pre_hooks for model in (student, teacher) for m in model.modules())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"teacher_layer": "9"}, "Sequential has no layer '9'"),
        ({"student_layer": "conv"}, "Sequential has no layer 'conv'"),
        ({"teacher_layer": "spare"}, "no forward pass has been through 'spare'"),
    ],
)
def test_a_refused_term_leaves_no_hook_behind(options, message):
    class Spare(nn.Sequential):
        def forward(self, images):
            return self[0](images)

    student, teacher = net(4), nn.Sequential(net(7), nn.Identity())
    if options.get("teacher_layer") == "spare":
        teacher = Spare()
        teacher.add_module("0", net(7))
        teacher.add_module("spare", nn.Identity())
    with pytest.raises(InputError, match=message):
        attach(ITRD(), student, teacher, **options)
    assert not any(m._forward_pre_hooks for model in (student, teacher) for m in model.modules())


def test_weights_out_of_range_are_refused():
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="weight must be"):
            FeatureTerm(ITRD(), "3", "3", weight=weight)


def test_terms_are_value_objects_and_methods_a_table():
    assert FeatureTerm(CRD(), "a", "b") == FeatureTerm(CRD(), "a", "b") != FeatureTerm(ITRD(), "a", "b")
    assert METHODS == {"crd": CRD, "itrd": ITRD}
