"""What a student loses: by hand, in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qkit import errors
from qkit.distill import attention_loss, feature_loss, hard_and_soft, soft_targets
from qkit.distill.losses import attention_map


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(3, 7), (3, 7, 2, 2), (3, 5, 7)])
def test_soft_targets(shape, temperature):
    student, teacher = torch.randn(shape), torch.randn(shape)
    axis = 2 if len(shape) == 3 else 1
    rows = [t.double().movedim(axis, -1).reshape(-1, 7).numpy() for t in (student, teacher)]
    total = 0.0
    for q, p in zip(*rows, strict=True):
        p, q = softmax(p / temperature), softmax(q / temperature)
        total += float(sum(p * np.log(p / q)))
    want = temperature**2 * total / len(rows[0])
    assert float(soft_targets(student, teacher, temperature)) == pytest.approx(want, rel=1e-4)
    assert float(soft_targets(teacher, teacher, temperature)) == pytest.approx(0, abs=1e-6)


def test_its_gradient_keeps_its_size_as_the_temperature_grows():
    """Hinton et al.: for high temperatures it is that of (student - teacher) / classes."""
    teacher = torch.randn(1, 7).double()
    teacher -= teacher.mean()
    student = torch.zeros(1, 7, requires_grad=True, dtype=torch.float64)
    soft_targets(student, teacher, 1000.0).backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, -teacher / 7, rtol=1e-2, atol=1e-3)


def test_padding_does_not_count():
    student, teacher = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    alone = torch.stack([soft_targets(student[:1, :3], teacher[:1, :3]) * 3,
                         soft_targets(student[1:], teacher[1:]) * 5]).sum() / 8  # fmt: skip
    torch.testing.assert_close(soft_targets(student, teacher, mask=mask), alone)


def test_the_mix():
    hard, soft = torch.tensor(2.0), torch.tensor(6.0)
    assert float(hard_and_soft(hard, soft, 0.25)) == 3.0
    assert hard_and_soft(None, soft, 0.25) is soft
    assert float(hard_and_soft(hard.double(), soft, 0.25)) == 3.0  # labels of a double model


def test_features_and_attention():
    a = torch.randn(2, 3, 4, 5)
    assert float(feature_loss(torch.zeros_like(a), a)) == pytest.approx(1)
    assert float(feature_loss(a, a)) == 0
    assert float(attention_loss(3 * a, a)) == pytest.approx(0, abs=1e-6)  # where, not how much
    want = (a[1].numpy() ** 2).sum(0).reshape(-1)
    want /= np.sqrt((want**2).sum())
    np.testing.assert_allclose(attention_map(a)[1].numpy(), want, rtol=1e-5)
    tokens = torch.randn(2, 6, 8)
    assert attention_map(tokens).shape == (2, 6)


def test_what_cannot_be_compared():
    with pytest.raises(errors.InputError, match=r"different outputs.*\(2, 3\).*\(2, 4\)"):
        soft_targets(torch.randn(2, 3), torch.randn(2, 4))
    with pytest.raises(errors.UsageError, match="temperature"):
        soft_targets(torch.randn(2, 3), torch.randn(2, 3), 0)
    with pytest.raises(errors.UsageError, match="weight of a teacher"):
        hard_and_soft(None, torch.tensor(1.0), 2)
