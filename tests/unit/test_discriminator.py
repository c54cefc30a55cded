"""Both sides of the adversarial game in one backward: each loss reaches its own side alone, and by the right gradient."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from g3n import flops
from g3n.latent import LatentSpace
from g3n.models.discriminator import PatchDiscriminator, both_sides
from g3n.stream.index import ShardIndex
from tests.unit.test_encode import save_run
from tests.unit.test_projection import batch_of, index, module_of, root, task_of, tree

__all__ = ["index", "root"]  # fixtures


class Scale(nn.Module):
    """Scores are w times the voxels."""

    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def forward(self, x: Tensor) -> Tensor:
        return self.w * x


def test_hinge_losses_by_hand() -> None:
    """Real 1 and 4, made 1 and -3, w = 0.5: scores 0.5, 2 and 0.5, -1.5."""
    critic = Scale(0.5)
    made = torch.tensor([1.0, -3.0]).view(2, 1, 1, 1).requires_grad_(True)
    generator, discriminator = both_sides(critic, made, torch.tensor([1.0, 4.0]).view(2, 1, 1, 1))
    assert generator.tolist() == [-0.5, 1.5]
    assert discriminator.tolist() == [0.5 + 1.5, 0.0 + 0.0]
    (0.1 * generator + discriminator).sum().backward()
    assert made.grad is not None
    assert critic.w.grad is not None
    assert made.grad.flatten().tolist() == pytest.approx([-0.05, -0.05])  # -0.1 w; nothing of the discriminator's hinge
    assert float(critic.w.grad) == -1.0 + 1.0  # -real + made where the hinge bends; nothing of the generator's loss


def test_one_backward_is_the_two_of_the_textbook() -> None:
    torch.manual_seed(0)
    critic, made, real = PatchDiscriminator(), torch.randn(2, 16, 16, 16), torch.randn(2, 16, 16, 16)
    for p in critic.parameters():
        p.data.mul_(3)
    one = made.clone().requires_grad_(True)
    generator, discriminator = both_sides(critic, one, real)
    (0.3 * generator + discriminator).mean().backward()
    other = copy.deepcopy(critic)
    other.zero_grad()
    (torch.relu(1 - other(real)).mean() + torch.relu(1 + other(made)).mean()).backward()
    for p, q in zip(critic.parameters(), other.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-7)
        assert float(q.grad.abs().max()) > 0
    two = made.clone().requires_grad_(True)
    other.requires_grad_(False)
    (-0.3 * other(two)).mean().backward()
    assert one.grad is not None
    assert two.grad is not None
    assert torch.allclose(one.grad, two.grad, rtol=1e-4, atol=1e-9)
    assert float(two.grad.abs().max()) > 0


def test_a_score_sees_38_voxels() -> None:
    """The receptive field of the docstring: the voxels that move the middle score."""
    x = torch.zeros(1, 64, 64, 64, requires_grad=True)
    PatchDiscriminator()(x)[0, 4, 4, 4].backward()
    assert x.grad is not None
    assert int((x.grad[0].abs().sum((1, 2)) > 0).sum()) == 38


def grads(module: nn.Module) -> dict[str, Tensor | None]:
    found = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad()
    return found


def test_it_begins_at_its_step(root: Path, index: ShardIndex) -> None:
    """Before, training is that of the plain tokenizer; from then on the voxels get the verdict's gradient and the critic its own."""
    plain, task = task_of(root, index), task_of(root, index, adversarial_weight=0.5, adversarial_start=3)
    alone, module, batch = module_of(plain), module_of(task), batch_of(task)
    own = list(alone.state_dict())
    assert [k for k in module.state_dict() if not k.startswith("discriminator.")] == own
    assert all(torch.equal(module.state_dict()[k], v) for k, v in alone.state_dict().items())
    nn.init.normal_(module.decoder.head.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    alone.decoder.head.weight.data.copy_(module.decoder.head.weight.data)
    expected, _ = plain.loss(alone, batch)
    expected.backward()
    before_any = grads(alone)
    module.train_step = 2
    loss, logs = task.loss(module, batch)
    loss.backward()
    found = grads(module)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()) + 2, rel=1e-6)
    assert all(torch.equal(found[k], v) for k, v in before_any.items() if v is not None)
    assert all(v is None for k, v in found.items() if k.startswith("discriminator."))
    module.train_step = 3
    loss, logs = task.loss(module, batch)
    loss.backward()
    found = grads(module)
    parts = logs["voxel"] + 0.5 * logs["adversarial"] + logs["discriminator"]
    assert float(loss.detach()) == pytest.approx(float(parts.mean()), rel=1e-6)
    own_side = [(k, v) for k, v in found.items() if k.startswith("discriminator.") and k.endswith("weight")]
    assert len(own_side) == 4
    assert all(v is not None and bool(v.abs().max() > 0) for _, v in own_side)
    head = "decoder.head.weight"
    assert not torch.allclose(found[head], before_any[head], rtol=1e-3)  # type: ignore[arg-type]


def test_voxels_outside_of_the_brain_are_not_judged(root: Path, index: ShardIndex) -> None:
    task = task_of(root, index, adversarial_weight=0.5)
    module: Any = module_of(task)
    features, target = task._inputs(batch_of(task))
    seen: list[Tensor] = []
    module.discriminator.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    module(features, None, target)
    assert len(seen) == 3
    assert all(bool((x[target == 0] == 0).all()) for x in seen)


def test_its_work_is_counted_and_its_tokenizer_opens(root: Path, index: ShardIndex, tmp_path: Path) -> None:
    """FLOPs and memory of a run are those after its start; a finished tokenizer has no discriminator."""
    plain, task = task_of(root, index), task_of(root, index, adversarial_weight=0.5, adversarial_start=1000)
    module = module_of(task)
    more, less = (
        flops.flops_a_sample(flops.twin(t, m), batch_of(t)) for t, m in ((task, module), (plain, module_of(plain)))
    )
    assert more > less
    model = {k: v for k, v in tree(root).items() if k in ("encoder", "net")}
    save_run(tmp_path / "run", "decoder", model, module, dict(task.artifact()))
    space = LatentSpace.open(tmp_path / "run")
    save_run(tmp_path / "plain", "decoder", model, module_of(plain), dict(plain.artifact()))
    assert LatentSpace.open(tmp_path / "plain").tokenizer_fingerprint == space.tokenizer_fingerprint
